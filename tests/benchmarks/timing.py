"""The two tools on the same model and inputs, alternating."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tl_dla import direct_logit_attribution, required_hooks
from tl_dla.model.hooks import product
from tl_dla.model.reader import ModelReader

UNITS = ("component", "head", "neuron")


def inputs(model: Any, batch: int, pos: int) -> dict[str, Any]:
    """Random tokens and answers, without a padding token among them."""
    generator = torch.Generator().manual_seed(0)
    low, high = 100, model.cfg.d_vocab
    tokens = torch.randint(low, high, (batch, pos), generator=generator)
    answer, incorrect = torch.randint(low, high, (2, batch), generator=generator)
    return {"tokens": tokens, "answer": answer, "incorrect": incorrect}


def ours(
    model: Any, data: dict[str, Any], unit: str, pos: Any, cache: Any = None, baseline: str = "foil"
) -> Any:
    """This package: an answer against a foil or the mean, or so many candidates."""
    prompt = data["tokens"] if cache is None else None
    answers = {"answer_tokens": data["answer"], "incorrect_tokens": data["incorrect"]}
    if baseline == "mean":
        answers["incorrect_tokens"] = "mean"
    elif baseline != "foil":
        answers = {"candidate_tokens": torch.arange(100, 100 + int(baseline))}
    return direct_logit_attribution(model, prompt, unit=unit, pos=pos, cache=cache, **answers)


def theirs(model: Any, data: dict[str, Any], unit: str, pos: Any, cache: Any = None) -> Any:
    """TransformerLens's tool; for neurons, which it does not have, its cache's own method."""
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    if unit != "neuron":
        prompt = data["tokens"] if cache is None else None
        return theirs(
            model, prompt, data["answer"], data["incorrect"], unit=unit, pos=pos, cache=cache
        )
    if cache is None:
        _, cache = model.run_with_cache(data["tokens"])
    stack = cache.stack_neuron_results(layer=-1, pos_slice=pos)
    return cache.logit_attrs(
        stack, tokens=data["answer"], incorrect_tokens=data["incorrect"], pos_slice=pos
    )


def agree(model: Any, unit: str) -> float:
    """The largest difference between the two tools, over the rows that both have."""
    data = inputs(model, 2, 16)
    mine = ours(model, data, unit, -1)
    other = theirs(model, data, unit, -1)
    other = getattr(other, "attribution", other)
    rows = mine.attribution
    if unit == "neuron":
        rows = rows[[i for i, kind in enumerate(mine.kinds) if kind == "neuron"]]
    n = min(len(rows), len(other)) - (unit == "head")
    difference = float((rows[:n] - other[:n]).abs().max())
    if difference > 1e-4 * float(other.abs().max()):
        raise SystemExit(f"The tools disagree on {unit} by {difference:.3g}: nothing was timed.")
    return difference


def seconds(run: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(runs: int, **timed: Callable[[], Any]) -> dict[str, float]:
    """The median time of each, in rounds that begin with another each time, after one unseen."""
    names, times = list(timed), {name: list[float]() for name in timed}
    for number in range(runs + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = seconds(timed[name])
            times[name] += [took] if number else []
    return {name: statistics.median(values) for name, values in times.items()}


def fresh(cache: Any) -> Any:
    """The same activations in a cache of its own, so that nothing is remembered between runs."""
    from transformer_lens import ActivationCache

    return ActivationCache(dict(cache.cache_dict), cache.model, has_batch_dim=cache.has_batch_dim)


def least(model: Any, cache: Any, batch: int, unit: str, pos: Any) -> Callable[[], Any]:
    """What no way from a cache can avoid.

    To read W_O (or W_out) of each layer, with two directions for each prompt; at all positions to
    read each activation too.
    """
    reader = ModelReader(model)
    names = required_hooks(model, unit) if pos is None else []
    weights = []
    for layer in range(reader.n_layers):
        if unit == "head" and (attention := reader.attention(layer)) is not None:
            weights.append(attention.W_O.flatten(0, 1))
        if unit == "neuron" and (mlp := reader.neurons(layer)) is not None:
            weights.append(mlp.W_out)
    directions = torch.randn(2 * batch, weights[0].shape[1] if weights else 1)

    def read() -> None:
        for name in names:
            cache[name].sum()
        for weight in weights:
            product(weight, directions)

    return read


def case(
    model: Any, data: dict[str, Any], unit: str, pos: Any, runs: int, with_theirs: bool = True
) -> dict[str, Any]:
    """From a prompt, beside a plain forward pass; then from a given cache."""
    tools = {"ours": ours, "theirs": theirs} if with_theirs else {"ours": ours}

    def calls(cache: Any = None) -> dict[str, Callable[[], Any]]:
        def call(tool: Callable[..., Any]) -> Callable[[], Any]:
            return lambda: tool(model, data, unit, pos, None if cache is None else fresh(cache))

        return {name: call(tool) for name, tool in tools.items()}

    with torch.no_grad():
        times = medians(runs, forward=lambda: model(data["tokens"]), **calls())
        _, cache = model.run_with_cache(data["tokens"])
        from_cache = {**calls(cache), "least": least(model, cache, len(data["tokens"]), unit, pos)}
        times |= {f"{name}_cache": x for name, x in medians(2 * runs, **from_cache).items()}
    batch, n = data["tokens"].shape
    where = {"unit": unit, "pos": "all" if pos is None else "last", "batch": batch, "tokens": n}
    return where | times
