"""C formulas for operations that compute each entry of their result from single entries of their
arguments.
"""

from gputune.modules.trace import Kwargs

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

_SIGMOID = "1 / (1 + EXP(-{self}))"

# gelu(x, approximate="tanh") = x sigmoid(2 z) with z = 0.798 (x + 0.0447 x^3)
_GATE = "1 / (1 + EXP((REAL)-1.5957691216057308 * {self} * (1 + (REAL)0.044715 * {self} * {self})))"
_GATE_SLOPE = "(REAL)1.5957691216057308 * (1 + (REAL)0.134145 * {self} * {self})"


def _with_gate(gate: str, formula: str) -> str:
    """Return a C formula that computes a gate once, as an expression with statements (GNU C)."""
    return f"({{{{ REAL gate = {gate}; {formula}; }}}})"


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
        for name in (
            "log log2 log10 log1p expm1 exp2 floor ceil trunc sqrt sin cos tan asin acos atan sinh "
            "cosh asinh acosh atanh erf erfc isinf"
        ).split()
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
    "addcdiv": "{self} + {value} * {tensor1} / {tensor2}",
    "atan2": "atan2({self}, {other})",
    "signbit": "signbit({self}) != 0",
    "fmod": "fmod({self}, {other})",
    "round": "rint({self})",
    "hypot": "hypot({self}, {other})",
    "threshold": "{self} <= {threshold} ? {value} : {self}",
    "threshold_backward": "{self} <= {threshold} ? 0 : {grad_output}",
    "tanh_backward": "{grad_output} * (1 - {output} * {output})",
    "sigmoid_backward": "{grad_output} * {output} * (1 - {output})",
    "silu": "{self} / (1 + EXP(-{self}))",
    "silu_backward": _with_gate(_SIGMOID, "{grad_output} * gate * (1 + {self} * (1 - gate))"),
    "log_sigmoid_forward": "({self} < 0 ? {self} : 0) - log1p(EXP(-fabs({self})))",
    "log_sigmoid_backward": "{grad_output} / (1 + EXP({self}))",
    "hardtanh": "{self} < {min_val} ? {min_val} : {self} > {max_val} ? {max_val} : {self}",
    "hardtanh_backward": "{self} <= {min_val} || {self} >= {max_val} ? 0 : {grad_output}",
    "hardsigmoid": "{self} <= -3 ? 0 : {self} >= 3 ? 1 : ({self} + 3) / 6",
    # Torch multiplies with 1/6 in single precision.
    "hardsigmoid_backward": "{self} > -3 && {self} < 3 ? {grad_output} * (1.0f / 6.0f) : 0",
    "hardswish": "{self} <= -3 ? 0 : {self} >= 3 ? {self} : {self} * ({self} + 3) / 6",
    "hardswish_backward": (
        "{self} <= -3 ? 0 : {self} < 3 ? {grad_output} * ({self} / 3 + (REAL)0.5) : {grad_output}"
    ),
    "hardshrink": "{self} >= -{lambd} && {self} <= {lambd} ? 0 : {self}",
    "softshrink": (
        "{self} > {lambd} ? {self} - {lambd} : {self} < -{lambd} ? {self} + {lambd} : {self} * 0"
    ),
    "hardshrink_backward": "{self} >= -{lambd} && {self} <= {lambd} ? 0 : {grad_out}",
    "softshrink_backward": "{self} >= -{lambd} && {self} <= {lambd} ? 0 : {grad_output}",
    "_prelu_kernel": "{self} > 0 ? {self} : {weight} * {self}",
    "celu": "{self} > 0 ? {self} : {alpha} * (EXP({self} / {alpha}) - 1)",
    "gelu_tanh": f"{{self}} * {_GATE}",
    "gelu_tanh_backward": _with_gate(
        _GATE, f"{{grad_output}} * gate * (1 + {{self}} * (1 - gate) * ({_GATE_SLOPE}))"
    ),
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
        for name, sign in {"and": "&&", "or": "||", "xor": "!="}.items()
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

BITWISE = {
    "bitwise_and": "{self} & {other}",
    "bitwise_or": "{self} | {other}",
    "bitwise_xor": "{self} ^ {other}",
    "bitwise_not": "~{self}",
}
"""C formulas of bitwise operations on whole numbers."""

_FMOD = "fmod({self}, {other})"
REMAINDER_OF_FRACTIONS = (
    f"{_FMOD} + ({_FMOD} != 0 && ({_FMOD} < 0) != ({{other}} < 0) ? {{other}} : 0)"
)

# Operations that are computed in the type of their arguments.
OF_INPUTS = {*_COMPARED, "logical_not", "signbit", "isinf", "isnan"}
_POWERS = {2: "{self} * {self}", 0.5: "sqrt({self})", 3: "{self} * {self} * {self}"}
_DEFAULTS = {
    "decimals": 0,
    "rounding_mode": None,
    "is_result": False,
    "self_is_result": False,
}


def is_formula(name: str, kwargs: Kwargs) -> bool:
    """Return whether a C formula computes each entry of an operation's result."""
    is_plain = all(kwargs.get(key, value) == value for key, value in _DEFAULTS.items())
    return name in FORMULAS and is_plain


def formula_of(name: str, kwargs: Kwargs) -> str:
    """Return the C formula that computes one entry of an operation's result."""
    if kwargs.get("approximate") == "tanh":
        name = name.replace("gelu", "gelu_tanh")
    if name == "clamp" and None in (kwargs["min"], kwargs["max"]):
        name = "clamp_min" if kwargs["max"] is None else "clamp_max"
    if name == "pow" and kwargs["exponent"] in _POWERS:
        return _POWERS[kwargs["exponent"]]
    formula = FORMULAS[name]
    # A product with 1 is left out.
    return formula.replace("{alpha} * ", "") if kwargs.get("alpha") == 1 else formula
