"""Against torch's own counter and the real KV cache: every method, stage by stage, exact to the last operation."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, wraps
from itertools import chain, repeat
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava.compress import available, get, method_class
from llava.compress.attach import Session
from llava.compress.trace import Trace
from llava.constants import IMAGE_TOKEN_INDEX, InputError
from llava.efficiency.methods import image_grid, plan_request, trace_requests
from llava.efficiency.ops import total
from llava.efficiency.request import STAGES, VISION, Request
from llava.efficiency.shapes import Model, load
from llava.mm_utils import process_images
from llava.model import miniature
from llava.model.builder import load_pretrained_model
from tests.conftest import picture

LAYERS = 5
"""Of tower and language model: room for several points of every method, which the miniature itself has not."""
# A method's own fields, where its layers or a ratio of a half do not fit so few.
MOVED: dict[str, dict[str, Any]] = {
    "sparsevlm": {"layers": (0, 1, 3)},
    "ficoco_l": {"control_encoding_layer": 1, "retention_ratio": 0.85},
    "ficoco_vl": {"control_language_layer": 1},
}
LISTED = {"retention_ratio": 192 / 576}  # SparseVLM's released lists are for few ratios
# Switches that change what is multiplied; ratios at which a point takes nothing, or nearly nothing is left.
VARIANTS = [
    "fastv(retention_ratio=1.0)",
    "fastv(layer=1, budget='after', retention_ratio=0.01)",
    "sparsevlm(layers=(0, 1, 3), recycle=False, positions='keep', retention_ratio=0.5)",
    "sparsevlm(layers=(2,), budget='after', retention_ratio=1.0)",
    "ficoco_l(AT=False)",
    "ficoco_l(control_encoding_layer=-1, r=3)",
    "ficoco_l(control_encoding_layer=1, layers=2, budget='after', retention_ratio=0.995)",
    "ficoco_v(merge_visual=False)",
    "ficoco_v(cls_free=True, control_encoding_layer=-1, r=4)",
    "ficoco_vl(control_language_layer=1, merge_visual=False, retention_ratio=0.85)",
    "tome(first_layer=2, proportional=False, r=5)",
    "tome(retention_ratio=1.0)",
    "visionzip(contextual=0.0, retention_ratio=0.5)",
    "visionzip(retention_ratio=1.0)",
]
CROPS = [("v1.6-vicuna", (168, 168)), ("v1.6-vicuna", (84, 200))]  # without padding, with
PROMPT = [1, 5, 9, IMAGE_TOKEN_INDEX, 6, 7, 8, 10]
TEXT, PREFIX, OUTPUT = 7, 3, 2


def profiles() -> list[str]:
    """Every method in every profile."""
    found = []
    for name in available():
        cls = method_class(name)
        for profile in cls.profiles:
            fields = ({"retention_ratio": 0.5} if cls.has_ratio else {}) | MOVED.get(name, {})
            listed = LISTED if (name, profile) == ("sparsevlm", "released") else {}
            found.append(str(get(name, **(fields | listed | {"profile": profile}))))
    return found


CASES = [
    *((spec, version, size) for spec in profiles() for version, size in [("v1.5", (150, 70)), *CROPS]),
    *((spec, *CROPS[1]) for spec in VARIANTS),
    *((spec, "v1.6-mistral", (150, 70)) for spec in ("none", "fastv(retention_ratio=0.5)")),
]
every = pytest.mark.parametrize(("spec", "version", "size"), CASES)


class StageCounter(FlopCounterMode):
    """Counts by stage: what runs is charged to the innermost one that has begun."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.stages = Counter(elsewhere=0, rotary=0, **dict.fromkeys(STAGES, 0))
        self._begun = ["elsewhere"]

    def charge(self) -> None:
        self.stages[self._begun[-1]] += self.get_total_flops() - self.stages.total()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.charge()
        self._begun.append(name)
        yield
        self.charge()
        self._begun.pop()


@contextmanager
def counted(model: Any) -> Iterator[StageCounter]:
    """Count on unfused attention; stages begin and end where the model calls them."""
    with ExitStack() as stack:
        counter = StageCounter()

        def within(owner: Any, attribute: str, stages: Iterator[str]) -> None:
            own = getattr(owner, attribute)

            @wraps(own)
            def run(*args: Any, **kwargs: Any) -> Any:
                with counter.stage(next(stages)):
                    return own(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, attribute, run))

        within(model.get_vision_tower(), "hidden", repeat("tower"))
        within(Session, "finish", repeat("tower"))  # layers that run for a tap alone
        within(Session, "record", repeat("selection"))
        for verb in ("reduce_in_encoder", "select_all", "reduce_in_llm"):
            within(type(model.method), verb, repeat("selection"))
        within(model.get_model().mm_projector, "forward", repeat("projector"))
        within(model, "forward", chain(["prefill"], repeat("decode")))
        within(model.get_model().rotary_emb, "forward", repeat("rotary"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(counter)
        yield counter
        counter.charge()


class Ran(NamedTuple):
    """What came of a call."""

    flops: dict[str, int]
    """By stage, rotary angles left out."""
    rotary: int
    """Of the angles: an outer product up to transformers 5.22, elementwise and not counted from then on."""
    cached: list[list[int]]
    """Bytes of keys and values of every layer, after every token."""
    trace: Trace

    def requests(self, shape: Model) -> list[Request]:
        return trace_requests(shape, self.trace, output=len(self.cached))


class Small(NamedTuple):
    """A deeper miniature."""

    shape: Model
    model: Any
    processor: Any

    def run(
        self,
        spec: str,
        sizes: Sequence[tuple[int, int]],
        prompts: Sequence[Sequence[int]] = (PROMPT,),
        output: int = OUTPUT,
    ) -> Ran:
        self.model.method, trace, cached = get(spec), Trace(), []
        images = [picture(*size) for size in sizes]
        given = {
            "images": process_images(images, self.processor, self.model.config),
            "image_sizes": sizes,
            "do_sample": False,
            "min_new_tokens": output,
            "max_new_tokens": output,
            "return_dict_in_generate": True,
        }

        def weigh(caches: Any) -> list[int]:
            return [layer.keys.nbytes + layer.values.nbytes for layer in caches.layers]

        after_token = self.model.register_forward_hook(lambda *run: cached.append(weigh(run[-1].past_key_values)))
        with after_token, counted(self.model) as counter:
            answer = self.model.generate(torch.tensor(prompts), **given, trace=trace)
        assert answer.sequences.shape == (len(prompts), output)
        assert weigh(answer.past_key_values) == cached[-1]
        assert counter.stages["elsewhere"] == 0
        flops = {stage: counter.stages[stage] for stage in STAGES}
        return Ran(flops, counter.stages["rotary"], cached, trace)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Small]:
    """Miniatures by version, with more layers, in float32."""
    changed, published = {"num_hidden_layers": LAYERS, "torch_dtype": "float32"}, miniature.published_config

    @cache
    def make(version: str) -> Small:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(miniature, "published_config", lambda name: published(name) | changed)
            patch.setitem(miniature.VISION, "num_hidden_layers", LAYERS)
            folder = str(miniature.write_miniature(tmp_path_factory.mktemp("deep") / "llava", version))
        _, model, processor, _ = load_pretrained_model(folder, device="cpu")
        return Small(load(folder), model, processor)

    return make


@pytest.fixture(scope="module")
def ran(small: Callable[[str], Small]) -> Callable[..., tuple[Model, Ran]]:
    """A model's sizes and what came of one image and question, run once."""

    @cache
    def run(spec: str, version: str, size: tuple[int, int]) -> tuple[Model, Ran]:
        return small(version).shape, small(version).run(spec, [size])

    return run


def analysed(request: Request) -> dict[str, int]:
    stages = request.stages().items()
    return {stage: total(op for op in ops if op.name != "angles").matmul_flops for stage, ops in stages}


def angles(request: Request) -> int:
    return total(op for ops in request.stages().values() for op in ops if op.name == "angles").matmul_flops


def summed(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {stage: sum(part[stage] for part in parts) for stage in STAGES}


def test_the_images_are_of_different_kinds(small: Callable[[str], Small]) -> None:
    whole, padded = (image_grid(small(version).shape, size) for version, size in CROPS)
    assert (whole.crops, whole.n_patches(True)) == ((2, 2), 5 * 36)
    assert padded.crops == (1, 3)
    assert padded.n_patches(True) < padded.n_views * 36


@every
def test_operations_are_those_that_torch_counts(spec: str, version: str, size: tuple[int, int], ran) -> None:
    shape, found = ran(spec, version, size)
    (request,) = found.requests(shape)
    assert analysed(request) == found.flops
    assert found.rotary in (angles(request), 0)


@every
def test_an_exact_plan_says_as_much(spec: str, version: str, size: tuple[int, int], ran) -> None:
    shape, found = ran(spec, version, size)
    planned = plan_request(shape, get(spec), size, text=TEXT, prefix=PREFIX, output=OUTPUT)
    if planned.plan.exact:
        assert analysed(planned.request) == found.flops
    else:  # the number of patches depends on the image
        assert spec.startswith(("globalcom2", "hired"))


@every
def test_the_cache_holds_as_many_bytes(spec: str, version: str, size: tuple[int, int], ran) -> None:
    shape, found = ran(spec, version, size)
    (request,) = found.requests(shape)
    each = shape.language.kv_bytes_per_token
    assert [sum(layers) for layers in found.cached] == [request.kv_bytes + done * each for done in range(OUTPUT)]
    assert found.cached[0] == [count * each // LAYERS for count in request.context]


def test_every_token_more_reads_a_longer_cache(small: Callable[[str], Small]) -> None:
    model = small("v1.6-vicuna")
    found = model.run("fastv(retention_ratio=0.5)", [CROPS[1][1]], output=5)
    (request,) = found.requests(model.shape)
    assert request.output == len(found.cached) == 5
    assert analysed(request) == found.flops


# Rows alike in size, so that nothing is padded; what every row attends to is its own.
@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "visionzip(retention_ratio=0.5)",
        "tome(retention_ratio=0.5)",
        "fastv(retention_ratio=0.5)",
        "sparsevlm(layers=(0, 1, 3), retention_ratio=0.5)",
        "ficoco_vl(control_language_layer=1, retention_ratio=0.5)",
        "ficoco_l(control_encoding_layer=1, profile='paper', retention_ratio=0.85)",
    ],
)
def test_a_batch_is_its_rows(spec: str, small: Callable[[str], Small]) -> None:
    model, size = small("v1.6-vicuna"), CROPS[1][1]
    found = model.run(spec, [size, size], [PROMPT, PROMPT])
    assert summed([analysed(request) for request in found.requests(model.shape)]) == found.flops
    planned = plan_request(model.shape, get(spec), size, text=TEXT, prefix=PREFIX, output=OUTPUT, batch=2)
    assert analysed(planned.request) == found.flops
    assert planned.request.kv_bytes == sum(found.cached[0])


def test_images_that_cannot_be_told_apart_are_refused(small: Callable[[str], Small]) -> None:
    """Two in the first row and none in the second are one each, by number; by tokens they are not."""
    model, size = small("v1.6-vicuna"), CROPS[1][1]
    found = model.run("none", [size, size], [[1, IMAGE_TOKEN_INDEX, 5, IMAGE_TOKEN_INDEX], [1, 5, 6, 7]])
    with pytest.raises(InputError, match="belong to row 0"):
        found.requests(model.shape)


@pytest.mark.parametrize("spec", ["none", "globalcom2(retention_ratio=0.25)", "visionzip(retention_ratio=0.5)"])
def test_padding_between_rows_comes_on_top(spec: str, small: Callable[[str], Small]) -> None:
    """Every row is counted as if alone; the language model really runs on as many tokens as the longest has."""
    model = small("v1.6-vicuna")
    found = model.run(spec, [size for _, size in CROPS], [PROMPT, PROMPT])
    requests = found.requests(model.shape)
    alone = summed([analysed(request) for request in requests])
    longest = analysed(replace(max(requests, key=lambda request: request.tokens), batch=2))
    for stage in STAGES:
        assert found.flops[stage] == (alone if stage in VISION else longest)[stage]
        assert (found.flops[stage] > alone[stage]) == (stage not in VISION)


@pytest.mark.parametrize(
    "spec",
    [
        "visionzip(retention_ratio=0.5)",
        "ficoco_v(retention_ratio=0.5)",
        "sparsevlm(layers=(0, 1, 3), retention_ratio=0.5)",
        "ficoco_l(control_encoding_layer=1, retention_ratio=0.85)",
    ],
)
def test_several_images_in_a_prompt(spec: str, small: Callable[[str], Small]) -> None:
    """They are one call of the tower, whose views are merged in one rectangle, and the text between them is text."""
    model = small("v1.6-vicuna")
    found = model.run(spec, [size for _, size in CROPS], [[*PROMPT, IMAGE_TOKEN_INDEX, 11]])
    (request,) = found.requests(model.shape)
    assert request.views == 5 + 4
    assert analysed(request) == found.flops


@pytest.mark.parametrize("prefix", [-1, 8])
def test_the_text_before_an_image_is_part_of_the_text(small: Callable[[str], Small], prefix: int) -> None:
    shape = small("v1.6-vicuna").shape
    with pytest.raises(InputError, match=f"prefix must be a part of the 7 text tokens, got {prefix}"):
        plan_request(shape, get("none"), (9, 9), text=7, prefix=prefix)
