"""What numbers are allowed: the description of a quantization grid."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Granularity = Literal["tensor", "channel", "group", "token", "timestep"]


class QuantSpec(BaseModel):
    """A frozen, validated description of a quantization grid.

    Integer grids have 2 to 8 bits and unsigned codes 0 … 2^bits − 1, with
    `value = (code − zero_point) · scale`; a symmetric grid has the fixed zero point 2^(bits−1).
    Float grids are the 8-bit formats of the Open Compute Project (`e4m3`: largest value 448, no
    infinities; `e5m2`: largest finite value 57344), always symmetric.

    `granularity` says how many scales a tensor has: one (`tensor`), one per row of a weight
    (`channel`), one per `group_size` neighbours of the last dimension (`group`; the last group may
    be shorter), or one per vector along the last dimension (`token`). Activations of a denoiser may
    have one for each of `timesteps` timesteps (`timestep`): steps set that, recipes do not. Where
    `of_timestep`, what is quantized is a function of the timestep alone: at one without a range it is the
    very tensor that says it. A `dynamic` spec takes all ranges from the tensor that is quantized; a static
    one from calibration.

    A symmetric integer grid has one step more below zero than above. `signed_scale` lets each scale
    be negative, which turns that step to the side of the largest value: finer steps for weights at
    4 bits and below. Some engines (TensorRT) refuse negative scales.

    `scale_dtype` rounds scales to what a file format keeps (GPTQ, AWQ and GGUF: float16), before codes
    are found for them; the tensors that hold them keep the model's dtype.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["int", "e4m3", "e5m2"] = "int"
    bits: int = Field(default=8, ge=2, le=8)
    symmetric: bool = True
    granularity: Granularity = "tensor"
    group_size: int | None = Field(default=None, ge=1)
    timesteps: int | None = Field(default=None, ge=1)
    of_timestep: bool = False
    dynamic: bool = False
    signed_scale: bool = False
    scale_dtype: Literal["float16", "bfloat16"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dtype != "int" and self.bits != 8:
            raise ValueError(f"bits {self.bits} with dtype {self.dtype}: float formats have 8 bits")
        if self.dtype != "int" and not self.symmetric:
            raise ValueError(f"symmetric false with dtype {self.dtype}: float formats have no zero point")
        if self.signed_scale and (self.is_float or not self.symmetric or self.dynamic):
            raise ValueError(
                "signed_scale true: only static symmetric integer grids have one, set it to false"
            )
        if self.granularity == "group" and self.group_size is None:
            raise ValueError("granularity group without group_size: give the number of values per group")
        if self.granularity != "group" and self.group_size is not None:
            raise ValueError(
                f"group_size {self.group_size} with granularity {self.granularity}: "
                "set granularity to group or remove group_size"
            )
        if (self.granularity == "timestep") != (self.timesteps is not None) or (
            self.timesteps is not None and self.dynamic
        ):
            raise ValueError(
                "granularity timestep without a number of timesteps, or with dynamic: a step like "
                "ptq-diffusion's finite-set-calibration chooses it, set granularity to tensor"
            )
        if self.of_timestep and self.timesteps is None:
            raise ValueError("of_timestep true without granularity timestep: steps set it, recipes do not")
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("granularity token without dynamic: tokens are only known at run time")
        return self

    @property
    def is_float(self) -> bool:
        """Whether the grid is a floating-point format."""
        return self.dtype != "int"

    @property
    def levels(self) -> int:
        """Largest integer code, 2^bits − 1 (integer grids only)."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """Zero point of a symmetric integer grid, 2^(bits−1)."""
        return 2 ** (self.bits - 1)

    def __str__(self) -> str:
        number = f"int{self.bits}" if self.dtype == "int" else f"fp8-{self.dtype}"
        scope = f"group {self.group_size}" if self.granularity == "group" else self.granularity
        scope = f"{scope} ({self.timesteps})" if self.timesteps else scope
        sign = "" if self.symmetric else " asymmetric"
        sign += " signed scale" if self.signed_scale else ""
        sign += f" {self.scale_dtype} scale" if self.scale_dtype else ""
        return f"{number}{sign} per {scope}{' dynamic' if self.dynamic else ''}"
