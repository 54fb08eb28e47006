"""Compresses some tensors in one way, and some in another."""

from collections.abc import Callable, Mapping

import jax

from sasg_jax._checks import expected, require
from sasg_jax.compressors.base import Compressed, Compressor


def by_leaf(
    choose: Callable[[str, jax.ShapeDtypeStruct], str], **compressors: Compressor
) -> Compressor:
    """Compresses each tensor by the one of ``compressors`` that ``choose`` names.

    Biases as they are, and of the matrices the largest entries of all of them::

        by_leaf(
            lambda path, leaf: "matrices" if leaf.ndim > 1 else "rest",
            matrices=top_k(0.01, scope="tree"),
            rest=identity(),
        )

    Sent and kept: what each of them sends and keeps of its own tensors, which are one tree to it.

    Args:
      choose: ``name = choose(path, leaf)``, of a tensor's place in the tree, ``"layers/0/bias"``,
        and its shape and dtype. (With the exchange ``"sharded"`` these are those of a vector.)
      **compressors: by names of one's own. All that draw at random share their key, or none does.

    Guarantees:
      - Those that all of them have: exact, unbiased, linear; conservation.

    ValueError for what is no compressor, needs means over workers (PowerSGD, which sends vectors as
    they are without this), or draws otherwise than another; and for a name that is not there, when
    a tree is first seen.

    >>> import sasg_jax, jax.numpy as jnp
    >>> how = {"matrices": sasg_jax.sign(), "rest": sasg_jax.identity()}
    >>> mixed = by_leaf(lambda path, leaf: "matrices" if leaf.ndim > 1 else "rest", **how)
    >>> mixed.message_size({"w": jnp.zeros((16, 16)), "b": jnp.zeros(16)}).bytes  # 256 bits, 17 * 4
    100
    """
    require(callable(choose), "choose", choose, "to be a function of a path and a leaf")
    require(compressors, "compressors", compressors, "to have one at least, by name")
    for name, part in compressors.items():
        is_one = isinstance(part, Compressor) and part.compress_mean is None
        allowed = "to be a compressor that needs no means over workers"
        require(is_one, name, getattr(part, "name", part), allowed)
    shares_key = check_keys(compressors)
    parts = compressors.values()
    places = {name: i for i, name in enumerate(compressors)}

    def split(tree):
        """Which leaves are whose, as a tuple for each name that is used."""
        mine: dict[str, list[int]] = {name: [] for name in compressors}
        for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            name = choose(where, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            if name not in compressors:
                names = ", ".join(map(repr, compressors))
                raise expected(f"choose({where!r}, ...)", name, f"to be one of {names}")
            mine[name].append(i)
        return {name: indices for name, indices in mine.items() if indices}

    def each(fn, tree, *others):
        """``fn(compressor, its leaves, ...)`` by name."""
        leaves = jax.tree.leaves(tree)
        own = {name: tuple(leaves[i] for i in indices) for name, indices in split(tree).items()}
        rest = lambda name: [other[name] for other in others]
        return {name: fn(name, compressors[name], x, *rest(name)) for name, x in own.items()}

    def join(parts, tree):
        leaves, treedef = jax.tree.flatten(tree)
        for name, indices in split(tree).items():
            for i, x in zip(indices, parts[name], strict=True):
                leaves[i] = x
        return treedef.unflatten(leaves)

    def key_of(key, name):
        return None if key is None else jax.random.fold_in(key, places[name])

    def compress(tree, memory, key):
        def one(name, part, x, own):
            return part.compress(x, own, key_of(key, name) if part.random else None)

        made = each(one, tree, memory)
        pick = lambda i: {name: compressed[i] for name, compressed in made.items()}
        return Compressed(pick(0), join(pick(1), tree), pick(2))

    def decompress_sum(messages, like, key):
        def one(name, part, x, rows):
            return part.decompress_sum(rows, x, key_of(key, name) if part.shares_key else None)

        return join(each(one, like, messages), like)

    def num_values(tree):
        sizes = each(lambda name, part, x: part.message_size(x).paper_bits // 32, tree)
        return sum(sizes.values())

    return Compressor(
        name=f"by_leaf({', '.join(f'{name}={part.name}' for name, part in compressors.items())})",
        compress=compress,
        decompress_sum=decompress_sum,
        init_memory=lambda tree: each(lambda name, part, x: part.init_memory(x), tree),
        num_values=num_values,
        exact=all(part.exact for part in parts),
        unbiased=all(part.unbiased or part.exact for part in parts),
        linear=all(part.linear for part in parts),
        random=any(part.random for part in parts),
        shares_key=shares_key,
    )


def check_keys(compressors: Mapping[str, Compressor]) -> bool:
    """Whether all draw from the key of the round. ValueError where only some of those do that draw
    at random: a message is made with one key."""
    draws = {name: part for name, part in compressors.items() if part.random}
    shared = [part.shares_key for part in draws.values()]
    for name, part in draws.items():
        allowed = "to draw from a worker's own key, as others here do"
        require(all(shared) or not part.shares_key, name, part.name, allowed)
    return any(shared)
