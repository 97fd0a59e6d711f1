"""More rows for test_bad_input.py: calls of the public Python API."""

from functools import cache
from typing import Any

import torch

import chatsae as cs
from bad_inputs import Place, python
from chatsae.batch import ActivationBatch
from chatsae.steering.spec import SteerSpec

WIDTH = 192


@cache
def demo() -> cs.LanguageModel:
    """The bundled model; rows only read it."""
    return cs.LanguageModel("demo", layers=[3])


def dialogue(role: str = "user", content: Any = "Hello.") -> cs.Dialogue:
    return cs.Dialogue("a", "here", (cs.Message(role, content),))


def sae(at: Place) -> cs.SAE:
    return cs.SAE.load(at.run / "saes" / "L3-2x-standard")


def narrow() -> cs.SAE:
    """An SAE of another width than the bundled model's."""
    from chatsae.config import SAEConfig, sae_specs
    from chatsae.sae.init import init_sae

    (spec,) = sae_specs(SAEConfig(architectures=("standard",), expansion_factors=(2,)), layers=(3,), d_in=8)
    return init_sae(spec, torch.Generator().manual_seed(0))


def acts(value: float = 1.0) -> Any:
    """Activations of the bundled model's width, all of one value."""
    one = next(iter(cs.render([dialogue()], demo().tokenizer)))
    batches = (ActivationBatch(torch.full((1, 16, WIDTH), value), one) for _ in range(8))
    return cs.mix(batches, capacity=64, batch_size=16)


def trained(saes: dict[str, cs.SAE], acts: Any, *, tokens: int = 64, layers: tuple[int, ...] | None = None) -> Any:
    return cs.train(saes, acts, cs.TrainConfig(tokens=tokens, batch_size=16), layers=layers)


CALL_ROWS = (
    python("LanguageModel: a wrong layer", lambda at: cs.LanguageModel("demo", layers=[99]), "layer 99 does not exist"),
    python(
        "LanguageModel: a layer below 0", lambda at: cs.LanguageModel("demo", layers=[-1]), "layer -1 does not exist"
    ),
    python("LanguageModel: a layer twice", lambda at: cs.LanguageModel("demo", layers=[3, 3]), "asked for twice"),
    python("LanguageModel: missing", lambda at: cs.LanguageModel(at.path / "no"), "no such directory"),
    python("LanguageModel: an empty directory", lambda at: cs.LanguageModel(at.path), "no config.json"),
    python("LanguageModel: no device", lambda at: cs.LanguageModel("demo", device="quantum"), "model.device: quantum"),
    python("LanguageModel: no dtype", lambda at: cs.LanguageModel("demo", dtype="float8"), "model.dtype: 'float8'"),
    python("LanguageModel: an int dtype", lambda at: cs.LanguageModel("demo", dtype="int64"), "model.dtype: 'int64'"),
    python(
        "LanguageModel: quantization",
        lambda at: cs.LanguageModel("demo", quantization="1bit"),
        "model.quantization: '1bit'",
    ),
    python("LanguageModel: none.gguf", lambda at: cs.LanguageModel("none.gguf"), "none.gguf: there is no such file"),
    python("LanguageModel: chat with nothing", lambda at: demo().chat([]), "at least one message"),
    python("LanguageModel: chat with no role", lambda at: demo().chat([{"content": "a"}]), "'role' is missing"),
    python(
        "LanguageModel: chat with an unknown role",
        lambda at: demo().chat([{"role": "oracle", "content": "a"}]),
        "unknown role oracle",
    ),
    python("read: nothing", lambda at: list(cs.read()), "no source is given"),
    python("read: missing", lambda at: list(cs.read(str(at.path / "no.jsonl"))), "no.jsonl does not exist"),
    python("read: an empty directory", lambda at: list(cs.read(str(at.path))), "holds no .jsonl"),
    python("read: a wrong split", lambda at: list(cs.read("pydocs", split="dev")), "split: 'dev'"),
    python(
        "read: a wrong order", lambda at: cs.read("pydocs", order="random"), "data.order must be one of mixed, listed"
    ),
    python(
        "read: a file of another kind",
        lambda at: list(cs.read(str(at.file("a.exe", "MZ")))),
        "a.exe: expected a .jsonl",
    ),
    python("read: no JSON", lambda at: list(cs.read(str(at.file("a.jsonl", "{\n")))), "a.jsonl, row 1", "not JSON"),
    python("read_text: missing", lambda at: list(cs.read_text(str(at.path / "no.txt"))), "no.txt does not exist"),
    python("dedup: n-grams below 0", lambda at: list(cs.dedup([dialogue()], ngram=-1)), "data.ngram"),
    python("dedup: no memory", lambda at: list(cs.dedup([dialogue()], memory_gb=float("nan"))), "memory_gb"),
    python("dedup: an unknown role", lambda at: list(cs.dedup([dialogue()], roles=["usr"])), "perhaps you meant user"),
    python(
        "render: a wrong method",
        lambda at: list(cs.render([dialogue()], demo().tokenizer, method="slow")),
        "'slow' is not one of",
    ),
    python(
        "render: length 0", lambda at: list(cs.render([dialogue()], demo().tokenizer, max_length=0)), "data.max_length"
    ),
    python("render: nothing", lambda at: list(cs.render([], demo().tokenizer)), "no token sequence"),
    python(
        "render: dialogues as documents",
        lambda at: list(cs.render([dialogue()], demo().tokenizer, method="bt-p")),
        "bt-p takes documents",
    ),
    python(
        "render: documents as dialogues",
        lambda at: list(cs.render([cs.Document("a", "b", "c")], demo().tokenizer)),
        "fast takes dialogues",
    ),
    python(
        "render: an unknown role",
        lambda at: list(cs.render([dialogue("oracle")], demo().tokenizer)),
        "unknown role 'oracle'",
    ),
    python("render: a text", lambda at: list(cs.render(["hello"], demo().tokenizer)), "got a str"),
    python("mix: capacity 0", lambda at: list(cs.mix(iter([]), capacity=0, batch_size=16)), "buffer.capacity: 0"),
    python("mix: batch size 0", lambda at: list(cs.mix(iter([]), capacity=64, batch_size=0)), "train.batch_size: 0"),
    python(
        "mix: a batch above the capacity",
        lambda at: list(cs.mix(iter([]), capacity=8, batch_size=16)),
        "buffer.capacity: 8",
    ),
    python(
        "mix: a matrix",
        lambda at: list(cs.mix(iter([torch.ones(16, 8)]), capacity=64, batch_size=16)),
        "ActivationBatch",
        "a Tensor",
    ),
    python("grid: a wrong architecture", lambda at: cs.grid(demo(), architectures=["topk"]), "sae.architectures"),
    python("grid: a learning rate that is nan", lambda at: cs.grid(demo(), lrs=[float("nan")]), "sae.lrs"),
    python("grid: an unknown field", lambda at: cs.grid(demo(), learning_rate=1), "unknown field learning_rate"),
    python("grid: a factor without end", lambda at: cs.grid(demo(), expansion_factors=[10**9]), "GiB"),
    python("grid: no layers", lambda at: cs.grid(cs.LanguageModel("demo")), "model.layers is empty"),
    python("train: nothing", lambda at: cs.train({}, acts()), "the SAEs want 0"),
    python(
        "train: another width",
        lambda at: trained({"a": narrow()}, acts()),
        "d_in is 8",
    ),
    python(
        "train: nan",
        lambda at: trained({"a": sae(at)}, acts(float("nan"))),
        "is nan at step 1",
    ),
    python(
        "train: less than a batch",
        lambda at: trained({"a": narrow()}, acts(), tokens=3),
        "less than one batch of 16",
    ),
    python(
        "train: other layers",
        lambda at: trained({"a": sae(at)}, acts(), layers=(1,)),
        "is of layer 3, the activations are of (1,)",
    ),
    python(
        "train_run: a path",
        lambda at: cs.train_run(cs.RunConfig(train=cs.TrainConfig(tokens=3)), at.path / "r"),
        "less than one batch of 128",
    ),
    python("evaluate: nothing to evaluate", lambda at: cs.evaluate({}, demo(), [dialogue()]), "no SAE to evaluate"),
    python("evaluate: no dialogue", lambda at: cs.evaluate({"a": sae(at)}, demo(), []), "no token sequence"),
    python("evaluate: another width", lambda at: cs.evaluate({"a": narrow()}, demo(), [dialogue()]), "another model"),
    python(
        "evaluate: limit 0",
        lambda at: cs.evaluate({"a": sae(at)}, demo(), [dialogue()], limit=0),
        "no dialogue to evaluate on",
    ),
    python(
        "evaluate: limit below 0",
        lambda at: cs.evaluate({"a": sae(at)}, demo(), [dialogue()], limit=-1),
        "limit must be at least 0",
    ),
    python("contexts: no dialogue", lambda at: cs.contexts({"a": sae(at)}, demo(), []), "no token sequence"),
    python("contexts: nothing", lambda at: cs.contexts({}, demo(), [dialogue()]), "no SAE to look at"),
    python(
        "contexts: limit below 0",
        lambda at: cs.contexts({"a": sae(at)}, demo(), [dialogue()], limit=-1),
        "limit must be at least 0",
    ),
    python("steer: nothing", lambda at: cs.steer(demo()), "give a sae and its feature"),
    python("steer: no SAE", lambda at: cs.steer(demo(), feature=3), "of which sae"),
    python(
        "steer: no such feature", lambda at: cs.steer(demo(), sae(at), feature=10**6), "feature 1000000 does not exist"
    ),
    python("steer: a feature below 0", lambda at: cs.steer(demo(), sae(at), feature=-1), "feature -1 does not exist"),
    python(
        "steer: nan",
        lambda at: cs.steer(demo(), sae(at), feature=1, alpha=float("nan")),
        "strength must be a finite number",
    ),
    python(
        "steer: another width",
        lambda at: cs.steer(demo(), narrow(), feature=1, alpha=1.0),
        "the direction has 8 numbers",
    ),
    python(
        "steer: no such layer", lambda at: cs.steer(demo(), vector=(1.0,) * 192, layer=99), "layer 99 does not exist"
    ),
    python("steer: an unknown option", lambda at: cs.steer(demo(), sae(at), feature=1, strenght=3), "strenght"),
    python(
        "steer: an SAE that is missing", lambda at: cs.steer(demo(), str(at.path / "no"), feature=1), "does not exist"
    ),
    python(
        "steer: a vector of zeros",
        lambda at: SteerSpec(vector=(0.0,), layer=1).direction(),
        "the vector is no direction",
    ),
    python("SAE.load: missing", lambda at: cs.SAE.load(at.path / "no"), "does not exist"),
    python("SAE.load: an empty directory", lambda at: cs.SAE.load(at.path), "holds no cfg.json"),
    python("SAE.load: a file", lambda at: cs.SAE.load(at.file("sae")), "is no directory"),
    python(
        "SAE.load: no device",
        lambda at: cs.SAE.load(at.run / "saes" / "L3-2x-standard", device="quantum"),
        "cannot be put on device quantum",
    ),
    python("FeatureStore.load", lambda at: cs.FeatureStore.load(at.path), "holds no features"),
    python("load_recipe", lambda at: cs.load_recipe(at.path / "no.yaml"), "no.yaml does not exist"),
    python("Report.load", lambda at: cs.Report.load(at.file("report.json", "{")), "report.json is damaged"),
    python("compare: nothing", lambda at: cs.compare([]), "no run to compare"),
)
