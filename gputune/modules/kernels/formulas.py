"""C formulas for operations that compute each entry of their result from single entries of their
arguments.
"""

from gputune.modules.trace import Kwargs, TraceError

_COMPARED = dict(
    zip("gt lt ge le eq ne logical_and logical_or".split(), "> < >= <= == != && ||".split())
)

_E = "EXP({self} < 20 ? {self} : 20)"
_W = f"({_E} * ({_E} + 2))"
_R = f"(1 / ({_W} + 2))"
"""Parts of mish: tanh(log(1 + e)) = w / (w + 2) with w = e (e + 2) and e = exp(x).

This form subtracts no nearly equal values. Its slope in x is 4 e (1 + e) / (w + 2)^2, because w + 1
= (1 + e)^2.
"""

FORMULAS = {
    "add": "{self} + {alpha} * {other}",
    "sub": "{self} - {alpha} * {other}",
    "rsub": "{other} - {alpha} * {self}",
    "mul": "{self} * {other}",
    "div": "{self} / {other}",
    "neg": "-{self}",
    "abs": "fabs({self})",
    "exp": "EXP({self})",
    **{
        name: f"{name}({{self}})"
        for name in "log log2 log1p expm1 floor sqrt sin cos erf isinf".split()
    },
    "rsqrt": "1 / sqrt({self})",
    "reciprocal": "1 / {self}",
    "tanh": "1 - 2 / (1 + EXP(2 * {self}))",
    "sigmoid": "1 / (1 + EXP(-{self}))",
    "relu": "{self} < 0 ? 0 : {self}",
    "pow": "pow({self}, {exponent})",
    "addcmul": "{self} + {value} * {tensor1} * {tensor2}",
    "lerp": "{self} + {weight} * ({end} - {self})",
    "where": "{condition} ? {self} : {other}",
    "clamp_min": "{self} < {min} ? {min} : {self}",
    "clamp_max": "{self} > {max} ? {max} : {self}",
    "masked_fill": "{mask} ? {value} : {self}",
    "threshold_backward": "{self} <= {threshold} ? 0 : {grad_output}",
    "tanh_backward": "{grad_output} * (1 - {output} * {output})",
    "sigmoid_backward": "{grad_output} * {output} * (1 - {output})",
    "silu": "{self} / (1 + EXP(-{self}))",
    "gelu": "{self} * (REAL)0.5 * (1 + erf({self} * (REAL)0.70710678118654752))",
    "gelu_backward": (
        "{grad_output} * ((REAL)0.5 * (1 + erf({self} * (REAL)0.70710678118654752))"
        " + {self} * (REAL)0.39894228040143268 * EXP((REAL)-0.5 * {self} * {self}))"
    ),
    "mish": f"{{self}} * {_W} / ({_W} + 2)",
    "mish_backward": f"{{grad_output}} * ({_W} * {_R} + {{self}} * (4 * {_E} * (1 + {_E}) * ({_R} * {_R})))",
    "elu": "{self} > 0 ? {scale} * {self} : {scale} * {alpha} * (EXP({input_scale} * {self}) - 1)",
    "elu_backward": (
        "{self_or_result} > 0 ? {scale} * {grad_output} : {grad_output} * {input_scale} * "
        "{scale} * {alpha} * EXP({input_scale} * {self_or_result})"
    ),
    "leaky_relu": "{self} > 0 ? {self} : {negative_slope} * {self}",
    "leaky_relu_backward": "{self} > 0 ? {grad_output} : {negative_slope} * {grad_output}",
    "softplus": "{self} * {beta} > {threshold} ? {self} : log1p(EXP({self} * {beta})) / {beta}",
    "softplus_backward": "{self} * {beta} > {threshold} ? {grad_output} : {grad_output} / (1 + EXP(-{self} * "
    "{beta}))",
    "remainder": "({self} % {other} + {other}) % {other}",
    "fill": "{value}",
    "copy": "{src}",
    **dict.fromkeys(("clone", "_to_copy"), "{self}"),
    **dict.fromkeys(("logical_not", "bitwise_not"), "!{self}"),
    **{
        f"bitwise_{name}": f"{{self}} {sign} {{other}}"
        for name, sign in {"and": "&&", "or": "||"}.items()
    },
    "isnan": "{self} != {self}",
    **dict.fromkeys(("sgn", "sign"), "({self} > 0) - ({self} < 0)"),
    "maximum": "{self} != {self} || {self} > {other} ? {self} : {other}",
    "minimum": "{self} != {self} || {self} < {other} ? {self} : {other}",
    "clamp": "{self} < {min} ? {min} : {self} > {max} ? {max} : {self}",
    **{name: f"{{self}} {sign} {{other}}" for name, sign in _COMPARED.items()},
}
"""C formula for one entry of each operation's result. The names in braces are the operation's
arguments."""

# Operations that are computed in the type of their arguments.
OF_INPUTS = {*_COMPARED, "logical_not", "isinf", "isnan"}
_POWERS = {2: "{self} * {self}", 0.5: "sqrt({self})", 3: "{self} * {self} * {self}"}
_DEFAULTS = {
    "rounding_mode": None,
    "approximate": "none",
    "is_result": False,
    "self_is_result": False,
}


def formula_of(name: str, kwargs: Kwargs) -> str:
    """Return the C formula that computes one entry of an operation's result. Raises TraceError for
    unsupported options."""
    for key, value in _DEFAULTS.items():
        if kwargs.get(key, value) != value:
            raise TraceError(f"{name} with {key}={kwargs[key]!r} is not supported")
    if name == "clamp" and None in (kwargs["min"], kwargs["max"]):
        name = "clamp_min" if kwargs["max"] is None else "clamp_max"
    if name == "pow" and kwargs["exponent"] in _POWERS:
        return _POWERS[kwargs["exponent"]]
    formula = FORMULAS[name]
    # A product with 1 is left out.
    return formula.replace("{alpha} * ", "") if kwargs.get("alpha") == 1 else formula
