"""Many threads ask one model: they are answered as one by one, and nothing of a call is left on the model."""

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from transformers import TextIteratorStreamer

from llava.compress import available, get, method_class
from llava.compress.attach import StandIn, attach, exclusive
from llava.compress.base import Compressor
from llava.compress.trace import Trace
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.language_model.branches import ATTENTION, branching
from llava.model.language_model.inside import drop_inside
from llava.model.language_model.prefix import SharedPrefix
from tests.conftest import Loaded, picture
from tests.methods import fitted

THREADS, CALLS = 8, 100
SIZES = [(160, 120), (70, 160), (500, 150), (90, 400), (84, 84), (300, 200), (168, 84), (400, 90)]
EVERY = [fitted(name, 0.5) for name in available()]
PROFILES = [(method, profile) for method in EVERY for profile in method_class(method.name).profiles]
VARIANTS = [
    # SparseVLM's release has lists for three layers, which this language model has not between its ends.
    *(
        replace(method, profile=profile)
        for method, profile in PROFILES
        if (method.name, profile) != ("sparsevlm", "released")
    ),
    get("fastv(layer=2, budget='after', retention_ratio=0.2)"),
    get("sparsevlm(layers=(1,), retention_ratio=0.75, positions='keep')"),
    get("ficoco_l(control_encoding_layer=0, r=7)"),
    get("ficoco_v(r=3)"),
    get("tome(r=3)"),
]


@pytest.fixture(scope="module")
def loaded(checkpoint: Callable[[str], Path]) -> Callable[..., Loaded]:
    """Models of this file's own: on shared ones transformers' hooks stay, once others asked for hidden states."""

    @cache
    def load(version: str = "v1.6-vicuna") -> Loaded:
        return Loaded(*load_pretrained_model(str(checkpoint(version)), device="cpu"))

    return load


@pytest.fixture
def model(loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A model whose threads are switched as often as possible."""
    found = loaded()
    monkeypatch.setattr(found.model, "method", get("globalcom2(retention_ratio=0.5)"))
    found.model.views = [process_images([picture(*size)], found.processor, found.model.config) for size in SIZES]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield found.model
    sys.setswitchinterval(before)
    del found.model.views
    untouched(found.model)


def untouched(model: Any) -> None:
    """Every module runs its class's own forward, nobody looks on, and attention is what the config says."""
    assert [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []
    assert [name for name, m in model.named_modules() if "forward" in vars(m)] == []
    assert all(layer.self_attn.config is model.config for layer in model.get_model().layers)


def prompt(number: int) -> Tensor:
    ids = torch.randint(3, 300, (6 + number % 5,), generator=torch.Generator().manual_seed(number))
    ids[2] = IMAGE_TOKEN_INDEX
    return ids[None]


def given(model: Any, number: int) -> dict[str, Any]:
    return {"images": model.views[number % 8], "image_sizes": [SIZES[number % 8]]}


def answer(model: Any, number: int, method: Compressor | None = None, **more: Any) -> tuple[Any, ...]:
    """What call `number` comes to: its tokens, what was kept of its image, and what every layer ran on."""
    trace = Trace()
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "method": method, "trace": trace, **more}
    tokens = model.generate(prompt(number), **given(model, number), **settings).tolist()
    return tokens, [image.packed.origin.tolist() for image in trace.images], trace.visual_per_layer, trace.method


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Make the calls from threads; what one raises is its result."""

    def settle(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(settle, calls))


def same_at_once(calls: Sequence[Callable[[], Any]]) -> None:
    wanted = [call() for call in calls]
    found = at_once(calls)
    assert [number for number, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]] == []


def test_every_method_at_once(model: Any) -> None:
    """Each thread with a method of its own, as neighbours that merge and drop disturb one another most."""
    same_at_once([lambda i=i, m=m: answer(model, i, m) for i, m in enumerate(EVERY)])


@pytest.mark.slow
@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_a_method_in_many_threads(model: Any, method: Compressor) -> None:
    model.method = method
    wanted = {number: answer(model, number) for number in range(40)}  # 8 images, 5 lengths
    found = at_once([lambda i=i: answer(model, i % 40) for i in range(CALLS)])
    assert [number for number in range(CALLS) if found[number] != wanted[number % 40]] == []


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1.5", "v1.6-vicuna", "v1.6-mistral"])
def test_all_variants_in_many_threads(loaded: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    _, model, processor, _ = loaded(version)
    views = [process_images([picture(*size)], processor, model.config) for size in SIZES]
    monkeypatch.setattr(model, "views", views, raising=False)
    same_at_once([lambda i=i: answer(model, i, VARIANTS[i % len(VARIANTS)]) for i in range(CALLS)])
    untouched(model)


def entrances(model: Any) -> list[Callable[[], Any]]:
    """Every way into a model."""

    def go_on(number: int) -> Any:
        packed = model.compress_images(**given(model, number))
        slot = torch.tensor([[5, 9, IMAGE_TOKEN_INDEX]])
        prefix = SharedPrefix.empty(model, 1).extend(model, slot, packed)
        rows = torch.tensor([[7, 8, 9], [30, 31, number]])
        return model.generate_after(prefix, rows, max_new_tokens=3, eos_token_id=None).tolist()

    def score(number: int) -> Any:
        return model(input_ids=prompt(number), **given(model, number)).logits.sum().item()

    def look(number: int) -> Any:
        views = model.views[number % 8][0]
        return model.encode_images(views).sum().item(), model.get_vision_tower()(views).sum().item()

    def inner(number: int) -> Any:
        return model.get_model()(input_ids=prompt(number).clamp_min(1)).last_hidden_state.sum().item()

    ways: list[Callable[[int], Any]] = [go_on, score, look, inner]
    ways += [lambda i, m=m, n=n: answer(model, i, fitted(m, 0.5), num_beams=n)
             for m, n in (("ficoco_vl", 2), ("fastv", 1), ("tome", 1), ("sparsevlm", 1))]  # fmt: skip
    return [torch.no_grad()(lambda i=i, way=way: way(i)) for i, way in enumerate(ways)]


def test_every_entrance_at_once(model: Any) -> None:
    same_at_once(entrances(model))


class InSelection(type(get("visionzip"))):  # type: ignore[misc]
    def select_all(self, batch: Any) -> Any:
        raise KeyError("in the middle")


class InTower(type(get("tome"))):  # type: ignore[misc]
    def reduce_in_encoder(self, tokens: Any) -> Any:
        raise KeyError("in the middle")


class InLanguage(type(get("ficoco_l"))):  # type: ignore[misc]
    def reduce_in_llm(self, tokens: Any) -> Any:
        raise KeyError("in the middle")


def test_an_error_in_the_middle_is_its_callers_alone(model: Any) -> None:
    failing = [InSelection(), InTower(r=2), InLanguage(control_encoding_layer=0, r=3)]
    sound = [fitted(name, 0.5) for name in ("tome", "ficoco_l", "hired", "fastv")]
    wanted = [answer(model, i, method) for i, method in enumerate(sound)] * 2
    calls = [lambda i=i, m=m: answer(model, i, m) for i, m in enumerate(sound)] * 2
    broken = [lambda i=i, m=m: answer(model, i, m) for i, m in enumerate((failing * 3)[:8])]
    found = at_once([call for pair in zip(calls, broken, strict=True) for call in pair])
    assert found[::2] == wanted
    assert [repr(error) for error in found[1::2]] == ["KeyError('in the middle')"] * 8
    untouched(model)
    assert answer(model, 0, sound[0]) == wanted[0]  # no turn was kept either


def test_a_call_works_with_the_method_it_began_with(model: Any) -> None:
    class Changing(type(get("hired"))):  # type: ignore[misc]
        def select_all(self, batch: Any) -> Any:
            model.method = "fastv(layer=1)"  # as another thread might
            return super().select_all(batch)

    (expected, *_), kept, ran, _ = answer(model, 0, get("hired(retention_ratio=0.5)"))
    model.method = Changing(retention_ratio=0.5)
    assert answer(model, 0)[:3] == ([expected], kept, ran)
    assert str(model.method) == "fastv(layer=1)"
    model.method = Changing(retention_ratio=0.5)
    with torch.no_grad():
        model(input_ids=prompt(0), **given(model, 0))  # forward, too, which would refuse fastv
    model.method = "fastv(layer=1)"
    assert answer(model, 0, "hired(retention_ratio=0.5)")[:3] == ([expected], kept, ran)


@pytest.mark.slow
def test_methods_that_change_all_the_time(model: Any) -> None:
    wanted = {str(m): {i: answer(model, i, m)[:3] for i in range(4)} for m in EVERY}
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            for method in EVERY:
                model.method = method

    changer = threading.Thread(target=change)
    changer.start()
    found = at_once([lambda i=i: (i % 4, *answer(model, i % 4)) for i in range(16)])
    over.set()
    changer.join()
    assert [wanted[method][number] for number, *_, method in found] == [tuple(rest[:3]) for _, *rest in found]


@pytest.mark.slow
def test_two_models_that_share_a_tower(model: Any, checkpoint: Callable[[], Any]) -> None:
    other = load_pretrained_model(str(checkpoint()), device="cpu")[1]
    other.get_model().vision_tower, other.views = model.get_vision_tower(), model.views
    other.config = other.get_model().config = model.config
    for layer in other.get_model().layers:
        layer.self_attn.config = model.config
    calls = [lambda i=i, m=m: answer((model, other)[i % 2], i, m) for i, m in enumerate(EVERY)]
    same_at_once(calls + entrances(other))
    untouched(other)


def test_an_answer_is_streamed_while_others_are_made(model: Any, loaded: Any) -> None:
    tokenizer = loaded().tokenizer
    wanted = [tokenizer.decode(answer(model, i)[0][0]) for i in range(4)]
    streams = [TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60) for _ in range(4)]
    threads = [
        threading.Thread(target=answer, args=(model, i), kwargs={"streamer": streams[i]}) for i in reversed(range(4))
    ]
    for thread in threads:
        thread.start()
    assert ["".join(stream) for stream in streams] == wanted
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("method", ["fastv", "sparsevlm", "ficoco_l", "globalcom2"])
def test_a_call_in_the_middle_of_a_call(model: Any, method: str) -> None:
    """A stopping criterion may ask the same model; the turn is its thread's already."""
    chosen, asides = fitted(method, 0.5), []

    def aside(ids: Tensor, scores: Any, **more: Any) -> bool:
        asides.append(answer(model, 5, fitted("fastv", 0.4)))
        return False

    wanted, other = answer(model, 1, chosen), answer(model, 5, fitted("fastv", 0.4))
    assert answer(model, 1, chosen, stopping_criteria=[aside]) == wanted
    assert asides == [other] * 4


def test_a_turn_is_no_part_of_a_model(model: Any, loaded: Any, tmp_path: Any) -> None:
    """It can be copied, pickled and saved while somebody has the turn; a copy is free."""
    expected = answer(model, 3)
    with exclusive(model.get_model().layers), attach(tower=model.get_vision_tower().vision_tower, method=get("none")):
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model.save_pretrained(tmp_path)
        loaded().tokenizer.save_pretrained(tmp_path)
        assert at_once([lambda: answer(copied, 3), lambda: answer(pickled, 3)]) == [expected] * 2
    assert str(copied.method) == str(pickled.method) == str(model.method)
    read = load_pretrained_model(str(tmp_path), device="cpu", method=str(model.method))[1]
    read.views = model.views
    assert answer(read, 3) == expected


def test_layers_that_accelerate_placed(model: Any) -> None:
    """Their forward is accelerate's, before and afterwards, and so is what that calls."""
    placed = copy.deepcopy(model)
    layers = placed.get_model().layers
    for module in (placed, *layers):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    found = [(vars(layer)["forward"], vars(layer)["_old_forward"]) for layer in layers]
    methods = [fitted(name, 0.5) for name in ("ficoco_l", "ficoco_vl", "fastv", "hired")]
    wanted = [answer(model, i, method) for i, method in enumerate(methods)]
    assert at_once([lambda i=i, m=m: answer(placed, i, m) for i, m in enumerate(methods)]) == wanted
    assert [(vars(layer)["forward"], vars(layer)["_old_forward"]) for layer in layers] == found
    assert [name for name, m in placed.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_others_wait_until_a_block_ends(model: Any) -> None:
    inner, tower, entered = model.get_model(), model.get_vision_tower(), []

    def enter(name: str, block: Any) -> None:
        with block:
            entered.append(name)

    spliced = model.splice_images(prompt(0), **given(model, 0))
    for layers, block in (
        (tower.vision_tower.encoder.layers, lambda: attach(tower=tower.vision_tower, method=get("none"))),
        (inner.layers, lambda: drop_inside(inner, get("none"), spliced)),
        (inner.layers, lambda: branching(inner)),
    ):
        threads = [threading.Thread(target=enter, args=(name, block())) for name in "ab"]
        with exclusive(layers), exclusive(layers):
            for thread in threads:
                thread.start()
            threads[0].join(0.05)
            assert entered == []
        for thread in threads:
            thread.join(60)
        assert sorted(entered) == ["a", "b"]
        entered.clear()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_blocks_may_end_in_any_order(model: Any, order: tuple[int, ...]) -> None:
    tower = model.get_vision_tower()
    trace = Trace()
    model.compress_images(**given(model, 0), trace=trace)
    grids = [image.grid for image in trace.images]
    methods = [fitted(name, 0.5) for name in ("tome", "ficoco_v", "tome")]
    spliced = model.splice_images(prompt(0), **given(model, 0))
    inside = [fitted("ficoco_l", 0.5), fitted("ficoco_vl", 0.5), fitted("ficoco_l", 0.7)]
    blocks = [attach(tower=tower.vision_tower, method=m, depth=tower.depth, grids=grids) for m in methods]
    others = [drop_inside(model.get_model(), m, spliced) for m in inside]
    for opened in (blocks, others):
        for block in opened:
            block.__enter__()
        for number in order:
            opened[number].__exit__(None, None, None)
    untouched(model)


def test_a_stand_in_that_has_left_runs_what_is_there() -> None:
    module = torch.nn.Linear(1, 1)
    x = torch.ones(1, 1)
    expected = module(x)
    first = StandIn(module, lambda x: x + 1)
    somebody, wrapped = module.forward, []
    module.forward = lambda x: wrapped.append(x) or somebody(x)  # type: ignore[assignment]
    second = StandIn(module, lambda x: x + 2)
    assert torch.equal(module(x), x + 2)
    first.leave()
    assert torch.equal(module(x), x + 2)
    second.leave()
    assert torch.equal(module(x), expected)  # through what somebody else put there, which stays
    assert len(wrapped) == 1
    module.forward = somebody  # they take theirs away and put back what they found
    assert torch.equal(module(x), expected)


def test_branching_leaves_the_config_alone(model: Any) -> None:
    before = model.config._attn_implementation
    layers = model.get_model().layers
    with branching(model.get_model()):
        assert model.config._attn_implementation == before
        assert {layer.self_attn.config._attn_implementation for layer in layers} == {ATTENTION}
    untouched(model)


@pytest.mark.slow
def test_compiled_code_takes_no_turn() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    @torch.compile(backend="eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        with exclusive(layers):
            return layers[0](x)

    x = torch.ones(1, 2)
    assert torch.equal(run(x), layers[0](x))
