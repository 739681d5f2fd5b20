"""Adam with state in 8 bits, as bitsandbytes keeps it."""

import torch

from loralloc.allocation.optimizer_state import BLOCK

QMAP = torch.cat([(torch.arange(-127, 128) / 127) ** 3, torch.ones(1)])
QMAP_UNSIGNED = (torch.arange(256) / 255) ** 3


def quantised(values, qmap):
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = flat.abs().amax(dim=1)
    scaled = (flat / absmax.clamp(min=1e-30)[:, None]).flatten()[: values.numel()]
    codes = (scaled[:, None] - qmap).abs().argmin(dim=1)
    return codes.to(torch.uint8).view(values.shape), absmax


def dequantised(state, number):
    absmax = state[f"absmax{number}"].repeat_interleave(BLOCK)
    codes = state[f"state{number}"]
    return (state[f"qmap{number}"][codes.flatten().long()] * absmax[: codes.numel()]).view(
        codes.shape
    )


class Adam8Bit(torch.optim.Optimizer):
    """Adam with both moments in 8 bits, under bitsandbytes' names; the second without a sign."""

    optimizer_name = "adam"

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "qmap1": QMAP, "qmap2": QMAP_UNSIGNED}
                    for number, qmap in ((1, QMAP), (2, QMAP_UNSIGNED)):
                        pair = quantised(torch.zeros_like(p), qmap)
                        state[f"state{number}"], state[f"absmax{number}"] = pair
                state["step"] += 1
                m = dequantised(state, 1).lerp(p.grad, 0.1)
                v = dequantised(state, 2).lerp(p.grad**2, 0.001)
                state["state1"], state["absmax1"] = quantised(m, QMAP)
                state["state2"], state["absmax2"] = quantised(v, QMAP_UNSIGNED)
                p.sub_(group["lr"] * m / (v.sqrt() + 1e-8))
