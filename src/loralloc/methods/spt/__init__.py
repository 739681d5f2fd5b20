"""SPT (Zhu & Tan 2023): prompts made from what is read, at layers that are searched for."""
