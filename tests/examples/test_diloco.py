"""DiLoCo against a NumPy loop with AdamW and Nesterov's momentum written out."""

import numpy as np
import optax
import problems
from problems import M

from examples import diloco

STEPS, ROUNDS, RATE, DECAY = 3, 6, 0.05, 0.1
B1, B2, EPSILON = 0.9, 0.999, 1e-8


def test_equals_a_loop():
    rng = np.random.default_rng(0)
    shape = {"b": (6,), "w": (4, 6)}
    centres = {
        name: rng.normal(size=(ROUNDS, M, STEPS, *s)).astype(np.float32)
        for name, s in shape.items()
    }
    step = diloco.diloco(
        problems.quadratic_loss,
        num_workers=M,
        steps=STEPS,
        inner=optax.adamw(RATE, B1, B2, EPSILON, weight_decay=DECAY),
    )
    state, infos = problems.scan_rounds(step.step)(
        step.init(problems.quadratic_params()), (centres,)
    )
    assert infos.uploaded.all()

    for name, s in shape.items():  # Adam and momentum are entry by entry
        w, velocity = np.zeros(s), np.zeros(s)
        first, second = np.zeros((M, *s)), np.zeros((M, *s))
        for t in range(ROUNDS):
            local = np.broadcast_to(w, (M, *s))
            for h in range(STEPS):
                g = local - centres[name][t, :, h]
                first = B1 * first + (1 - B1) * g
                second = B2 * second + (1 - B2) * g**2
                count = t * STEPS + h + 1  # over all rounds: each worker's Adam goes on
                adam = first / (1 - B1**count) / (np.sqrt(second / (1 - B2**count)) + EPSILON)
                local = local - RATE * (adam + DECAY * local)
            way = (w - local).mean(0)
            velocity = 0.9 * velocity + way
            w = w - 0.7 * (way + 0.9 * velocity)
        np.testing.assert_allclose(state.params[name], w, rtol=1e-3, atol=1e-5)
