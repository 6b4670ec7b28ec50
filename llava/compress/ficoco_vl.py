"""FiCoCo-VL (arXiv 2411.17686v1): FiCoCo-V in the encoder, then FiCoCo-L in the language model on what V left."""

from dataclasses import dataclass

from llava.compress import ficoco_l, ficoco_v
from llava.compress.stages import LayerSizes, LayerTokens, Product, Reduction
from llava.constants import InputError


@dataclass(frozen=True, kw_only=True)
class FiCoCoVL(ficoco_v.FiCoCoV):
    """Merge patches in the second half of the encoder, and what is left of them in the layers of the language model.

    No split of the work was published. Here V leaves R^s of the patches, s being `vision_share`, and L makes the mean
    over its layers R^(1 − s) of what enters it, newlines included, so that the mean over layers of the patches is R.
    L merges slowly from an early layer on, and cannot go below 0.6 with its defaults: hence V's large share.

    Differs from the released code in: what `ficoco_v` and `ficoco_l` say; and the fields of both are given here, where
    the release needs two files edited, and the number of tokens V leaves written into a third.
    """

    name = "ficoco_vl"
    paper = "arXiv 2411.17686v1"
    query_agnostic = False
    numbers = ("r", "r_language")
    llm_middle = True

    vision_share: float = 0.85
    """s: the encoder's share of the work, in (0, 1) both work."""
    AT: bool = True
    """Whether the language model merges; if not, the encoder does all the work."""
    r_language: int | None = None
    """Tokens merged in every merging layer of the language model; given together with `r`, or neither."""
    control_language_layer: int = 4
    """The last layer of the language model, from 0, that does not merge."""
    language_layers: int | None = None
    """How many layers of the language model merge; None: all to the last one."""
    positions: str = "keep"
    """`keep` positions in the language model, with gaps, or `repack` them in every layer."""

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        super().__post_init__()
        self._require("vision_share", float, 0, 1)
        self._require_switch("AT")
        for number, switch in (("r", "merge_visual"), ("r_language", "AT")):
            if getattr(self, number) is not None and not getattr(self, switch):
                raise InputError(f"{self.name}'s {number} means nothing with {switch}=False; give one of them only")
        if self.merge_visual and self.AT and (self.r is None) != (self.r_language is None):
            raise InputError(f"give {self.name} both r and r_language or neither, got {self.r} and {self.r_language}")
        self._language_at(1.0)  # refuses the rest

    @property
    def encoder_ratio(self) -> float:
        """The share of patches that leaves the encoder."""
        if not self.merge_visual:
            return 1.0
        return self.ratio**self.vision_share if self.AT else self.ratio

    @property
    def _language(self) -> ficoco_l.FiCoCoL:
        """What works in the language model."""
        return self._language_at(min(1.0, self.ratio / self.encoder_ratio))

    def _language_at(self, ratio: float) -> ficoco_l.FiCoCoL:
        return ficoco_l.FiCoCoL(
            retention_ratio=ratio if self.r_language is None else None,
            profile=self.profile,
            control_encoding_layer=self.control_language_layer,
            AT=self.AT,
            r=self.r_language,
            layers=self.language_layers,
            epsilon=self.epsilon,
            positions=self.positions,
        )

    @property
    def llm_points(self) -> tuple[int, ...]:
        """Those of FiCoCo-L."""
        return self._language.llm_points

    def points_in(self, depth: int) -> tuple[int, ...]:
        """Those of FiCoCo-L."""
        return self._language.points_in(depth)

    def visual_per_layer(self, n_visual: int, depth: int) -> tuple[int, ...]:
        """What FiCoCo-L makes of what V left."""
        try:
            return self._language.visual_per_layer(n_visual, depth)
        except InputError as error:
            share = "" if self.fixed else f" a share of {self._language.ratio:.3g}"
            raise type(error)(
                f"{self.name} leaves the rest to FiCoCo-L,{share} (fields control_language_layer, language_layers, "
                f"r_language here; a larger vision_share leaves it less to do): {error}"
            ) from error

    def visual_left(self, n_visual: int, depth: int) -> int:
        """What FiCoCo-L leaves."""
        return self._language.visual_left(n_visual, depth)

    def reduce_in_llm(self, tokens: LayerTokens) -> Reduction:
        """FiCoCo-L's step."""
        return self._language.reduce_in_llm(tokens)

    def llm_products(self, sizes: LayerSizes) -> tuple[Product, ...]:
        """FiCoCo-L's."""
        return self._language.llm_products(sizes)
