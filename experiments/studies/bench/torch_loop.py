"""SASG in PyTorch, for comparison."""

import itertools
import statistics
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from experiments.configs import Config
from experiments.studies.bench import rounds


class TorchLoop:
    """SASG as a user of PyTorch would write it: a loop over workers, and over tensors in each."""

    def __init__(self, config: Config, data: rounds.Calls):
        self.config = config
        tensor = lambda x: torch.from_numpy(np.array(x))  # copied: torch wants to write
        self.batches = itertools.cycle(
            [(tensor(images), tensor(labels).long()) for images, labels in data]
        )
        start = [tensor(x) for x in jax.tree.leaves(rounds.start())]
        self.params = [p.clone().requires_grad_() for p in start]
        workers = range(config.num_workers)
        self.residuals = [[torch.zeros_like(p) for p in start] for _ in workers]
        self.stale = [[p.clone().requires_grad_() for p in start] for _ in workers]
        self.messages: list[Any] = [None for _ in workers]
        self.staleness = [config.max_staleness for _ in workers]
        self.steps: list[float] = []
        self.rounds, self.uploads = 0, []
        for _ in range(rounds.WARM_UP_CALLS):
            self.run()

    def fraction(self) -> float:
        """The part of the workers that upload."""
        return statistics.mean(self.uploads[rounds.WARM_UP_CALLS :])

    def run(self) -> None:
        """Makes the rounds of a call."""
        images, labels = next(self.batches)
        uploads = sum(self._one_round(*batch) for batch in zip(images, labels, strict=True))
        self.uploads.append(uploads / (len(images) * self.config.num_workers))

    def _one_round(self, images: Any, labels: Any) -> int:
        config, count = self.config, self.config.num_workers
        alpha = config.alpha_c["sasg"] * count / config.learning_rate
        threshold = alpha * sum(self.steps[-config.history :]) / count**2
        uploads = sum(self._one_worker(m, images[m], labels[m], threshold) for m in range(count))
        moved = 0.0
        with torch.no_grad():
            for i, p in enumerate(self.params):
                step = torch.zeros(p.numel())
                for message in self.messages:
                    indices, values = message[i]
                    step[indices] += values
                step /= count
                p -= step.view_as(p)
                moved += float((step**2).sum())
        self.steps.append(moved)
        self.rounds += 1
        return uploads

    def _one_worker(self, m: int, images: Any, labels: Any, threshold: float) -> bool:
        """Whether it has uploaded."""
        config = self.config
        grads = self._grads(self.params, images, labels)
        must = self.rounds < config.history or self.staleness[m] >= config.max_staleness
        if not must:
            stale = self._grads(self.stale[m], images, labels)
            innovation = sum(((g - s) ** 2).sum() for g, s in zip(grads, stale, strict=True))
            if innovation <= threshold:
                self.staleness[m] += 1
                return False
        message = []
        with torch.no_grad():
            for g, residual in zip(grads, self.residuals[m], strict=True):
                residual.add_(g, alpha=config.learning_rate)
                flat = residual.view(-1)
                indices = torch.topk(flat.abs(), max(1, int(config.density * flat.numel())))[1]
                message.append((indices, flat[indices]))
                flat[indices] = 0
            for stale, p in zip(self.stale[m], self.params, strict=True):
                stale.copy_(p)
        self.messages[m], self.staleness[m] = message, 1
        return True

    def _grads(self, params: Any, images: Any, labels: Any) -> Any:
        b1, b2, w1, w2 = params  # in the order of the tree's leaves
        logits = torch.relu(images @ w1 + b1) @ w2 + b2
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), params)
