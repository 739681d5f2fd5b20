"""Every method of the paper's Table 1 by name, one file each, behind one Protocol.

A method's own step (ALoRA's round, AdaLoRA's budget, SoRA's proximal step) is one hook of that
Protocol: `training` calls it and knows no method by name.
"""
