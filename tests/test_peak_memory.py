"""The peaks that the loss and a whole training step promise, as the system counts them."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_only("memory of the CPU")

MIB = 1 << 20

# peak(run) -> bytes that `run` took on top of what was resident before it, at most at once.
PRELUDE = """
import gc, torch, lmkern
torch.set_num_threads(2)

def resident(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

def peak(run):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before
"""


def measure(code: str) -> int:
    """What the last line of ``code`` prints, in a process of its own."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    result = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


LOSS = """
from lmkern.functional import linear_cross_entropy
N, D, V = {size}
def step(N, D, V):
    x = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    target = torch.randint(0, V, (N,))
    def run():
        linear_cross_entropy(x, weight, target{options}).backward()
    return run
step(200, 100, 3000)()
print(peak(step(N, D, V)) - 4 * (N + V) * D)
"""


@pytest.mark.long
@pytest.mark.parametrize("size", [(512, 768, 50257), (4096, 512, 32000), (1024, 384, 50257)])
def test_linear_cross_entropy_takes_an_eighth_of_the_logits(size):
    N, _, V = size
    options = ", z_loss=1e-4, label_smoothing=0.1" if N == 4096 else ""
    extra = measure(LOSS.format(size=size, options=options))
    assert extra <= 4 * N * V / 8, f"{extra / MIB:.1f} MiB of {4 * N * V / 8 / MIB:.1f}"


STEP = """
from lmkern.models import GPT, GPTConfig
model = GPT(GPTConfig(50257, 256, 6, 6, 384), "{backend}")
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids, targets = torch.randint(50257, (2, 4, 256))
def run():
    for _ in range(3):
        loss, _ = model(ids, targets=targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
print(peak(run))
"""


@pytest.mark.long
def test_a_training_step_of_gpt_takes_three_fifths_of_torch_s_memory():
    """Gradients, moments and activations: all but the parameters, which both have."""
    ours, torchs = (measure(STEP.format(backend=b)) for b in ("lmkern", "torch"))
    assert ours <= 0.6 * torchs, f"{ours / MIB:.0f} MiB of torch's {torchs / MIB:.0f}"
