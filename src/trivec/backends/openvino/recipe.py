"""With which arithmetic an encoder runs: a plain value, and its ladder of forms.

Linear layers have a form, the products of attention a type. Everything else (embeddings, LayerNorm,
softmax of the scores it is given, GELU) is fp32 in every recipe.
"""

from dataclasses import dataclass, replace
from enum import Enum


class Form(Enum):
    """How a linear layer multiplies. All int8 weights are symmetric, one scale an output channel."""

    FP32 = "fp32"
    INT8_ROWS = "int8-rows"  # activations int8, one scale a token: the fastest kernel
    INT8_GROUPS = "int8-groups"  # activations int8, one scale a token and group of channels


@dataclass(frozen=True, slots=True)
class Recipe:
    """The arithmetic of one compiled encoder."""

    form: Form
    group_size: int | None = None  # channels that share a scale, where the form has groups
    exact_layers: frozenset[int] = frozenset()  # layers in fp32 whatever the form
    bf16_attention: bool = False  # products of attention in bf16, but for exact layers

    def __post_init__(self) -> None:
        assert (self.group_size is not None) == (self.form is Form.INT8_GROUPS)

    @property
    def precision(self) -> str:
        """What a model card calls it."""
        return "fp32" if self.form is Form.FP32 else "int8"

    @property
    def name(self) -> str:
        """A short exact name, fit for a file: `int8-rows-bf16`, `int8-groups-32-exact-0-11`."""
        parts = [self.form.value]
        if self.group_size is not None:
            parts.append(str(self.group_size))
        if self.bf16_attention:
            parts.append("bf16")
        if self.exact_layers:
            parts += ["exact", *(str(layer) for layer in sorted(self.exact_layers))]
        return "-".join(parts)

    def form_of(self, layer: int) -> Form:
        """The form that *layer* runs in."""
        return Form.FP32 if layer in self.exact_layers else self.form

    def has_bf16_attention(self, layer: int) -> bool:
        return self.bf16_attention and layer not in self.exact_layers


FP32 = Recipe(Form.FP32)
INT8_ROWS = Recipe(Form.INT8_ROWS)
INT8_ROWS_BF16 = Recipe(Form.INT8_ROWS, bf16_attention=True)
INT8_GROUPS_128 = Recipe(Form.INT8_GROUPS, group_size=128)
INT8_GROUPS_32 = Recipe(Form.INT8_GROUPS, group_size=32)
INT8_RECIPES = (INT8_ROWS_BF16, INT8_ROWS, INT8_GROUPS_128, INT8_GROUPS_32)


def int8_ladder(*, bf16_pays: bool) -> tuple[Recipe, ...]:
    """From the fastest to the most careful; a certificate says how far a model must climb.

    *bf16_pays* says that this machine's bf16 products are worth their lost digits.
    """
    foot = (INT8_ROWS_BF16,) if bf16_pays else ()
    return (*foot, INT8_ROWS, INT8_GROUPS_128, INT8_GROUPS_32)


def int8_named(name: str) -> Recipe | None:
    """The int8 recipe of that exact name, also one with exact layers; None where there is none."""
    base, _, exact = name.partition("-exact-")
    layers = frozenset(int(layer) for layer in exact.split("-") if layer.isdecimal())
    found = (replace(recipe, exact_layers=layers) for recipe in INT8_RECIPES if recipe.name == base)
    return next((recipe for recipe in found if recipe.name == name), None)
