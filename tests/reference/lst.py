"""The ladder of Sung et al. 2022 as equations on what the backbone's blocks put out."""

import math


def climb(embeddings, outputs, *, downs, gates, blocks, norm, up):
    """`downs`, `blocks`, `norm` and `up` are functions of a tensor; `outputs` and `gates` lists."""
    s = downs[0](embeddings)
    for down, gate, block, h in zip(downs[1:], gates, blocks, outputs, strict=True):
        mu = 1 / (1 + math.exp(-gate / 0.1))
        s = mu * s + (1 - mu) * down(h)
        s = block(s)
    return up(norm(s))
