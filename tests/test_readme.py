"""The README's Python runs as it stands, from the top down."""

import pathlib
import re

import jax

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    namespace = {}
    with jax.numpy_rank_promotion("allow"):  # biases are added to batches
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    uploads, uplink_bytes, downlink_bytes = map(int, capsys.readouterr().out.split("\n")[0].split())
    # 7,840 weights at 1 %: 78 values of 4 bytes with 2 of index; one bias of 4 bytes with 1.
    assert uplink_bytes == uploads * (78 * 6 + 5) + 20 * 10
    assert downlink_bytes == 20 * 10 * 4 * 7850
    assert 10 * 10 <= uploads < 20 * 10


def test_the_diff_of_the_readme_swaps_two_lines():
    (diff,) = re.findall(r"^```diff\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    lines = diff.splitlines()
    assert sum(line.startswith("-") for line in lines) == 2
    assert sum(line.startswith("+") for line in lines) == 2
