"""MT-Bench answers of several models, compared in pairs by a judge (Liu et al. 2024, Appendix D).

`questions` reads the questions and ready answers, `conversation` writes the prompt of a turn,
`answers` lets a model answer; `prompt` has the words for the judge and reads its scores,
`endpoint` asks it, `replies` keeps what it said, `review` compares two contestants.
"""
