"""AdaLoRA as Zhang et al. 2023 print it, element by element: eqs. 8 to 12."""

BETA1 = BETA2 = 0.85


def budget(step: int, *, first: int, last: int, num_steps: int, tinit: int, tfinal: int) -> int:
    """b(t), eq. 12, in triplets."""
    if step <= tinit:
        return first
    if step >= num_steps - tfinal:
        return last
    progress = (step - tinit) / (num_steps - tfinal - tinit)
    return int(last + (first - last) * (1 - progress) ** 3)


class Smoothed:
    """I-bar and U-bar of one element, and s = I-bar * U-bar: eqs. 9 to 11."""

    def __init__(self):
        self.sensitivity = self.uncertainty = 0.0

    def update(self, value: float, gradient: float) -> None:
        now = abs(value * gradient)
        self.sensitivity = BETA1 * self.sensitivity + (1 - BETA1) * now
        self.uncertainty = BETA2 * self.uncertainty + (1 - BETA2) * abs(now - self.sensitivity)

    @property
    def score(self) -> float:
        return self.sensitivity * self.uncertainty


class Triplet:
    """S of a singular value and its two vectors: eq. 8."""

    def __init__(self, width_in: int, width_out: int):
        self.value = Smoothed()
        self.right = [Smoothed() for _ in range(width_in)]
        self.left = [Smoothed() for _ in range(width_out)]

    @property
    def score(self) -> float:
        right = sum(element.score for element in self.right) / len(self.right)
        left = sum(element.score for element in self.left) / len(self.left)
        return self.value.score + right + left


def kept(scores: list[float], num_kept: int) -> list[bool]:
    """Which triplets are among the most important of the model."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [index in order[:num_kept] for index in range(len(scores))]
