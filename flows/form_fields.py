"""What forms are made of: fields, their types and bounds, closed to everything that is not meant."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from dev2pro import allowed
from dev2pro.artifacts.record import ROOT
from flows import plan
from flows.generations.aliases import ALIAS, NAME
from flows.roots import within_roots

END = r"(?!\n)"  # after $, which in Python, unlike in a browser, also matches before a final line break
CONTROL_CHARACTERS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"  # control characters of terminals, and bidirectional overrides
SAFE = rf"^(?!.*(\$\{{|_target_|(^|/)\.\.(/|$)))[^{CONTROL_CHARACTERS}~]+${END}"  # no interpolation, no parent folder, no control character


def config_names(group: str) -> tuple[str, ...]:
    """The names of a group of conf/."""
    return tuple(sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml")))


Name = Annotated[str, StringConstraints(pattern=plan.NAME + END)]
RunFolder = Annotated[str, StringConstraints(pattern=r"^runs(/[A-Za-z0-9][A-Za-z0-9_.@+-]{0,63})+$" + END), AfterValidator(within_roots)]
Text = Annotated[str, StringConstraints(pattern=SAFE, min_length=1, max_length=500)]
Url = Annotated[Text, AfterValidator(within_roots)]
Base = Annotated[Text, AfterValidator(lambda url: url if ALIAS.fullmatch(url) else within_roots(url))]
Line = Annotated[str, StringConstraints(pattern=f"^{NAME}${END}")]
Seed = Annotated[
    int, Field(0, **allowed.RANGES["seed"].bounds(), title="Seed", description="The same seed and values give the same result, bit for bit.")
]
Strength = Annotated[float, Field(**allowed.RANGES["strengths"].bounds())]
if TYPE_CHECKING:  # the names depend on the files in conf/
    Experiment = str
    Model = str
    Hardware = str
    PlanName = str
else:
    Experiment, Model, Hardware, PlanName = (Literal[config_names(group)] for group in ("experiment", "model", "hardware", "pipeline"))


def form_field(title: str, description: str, default: Any = None, **bounds: Any) -> Any:
    """A form field. Without a default it may be left empty."""
    default_args = {"default_factory": default} if callable(default) else {"default": default}
    return Field(title=title, description=description if default is not None else f"{description} Empty: as in conf/.", **default_args, **bounds)


def number(key: str, title: str, description: str, default: Any = None) -> Any:
    """A form field for a number, with the bounds that the stages have for this key."""
    return form_field(title, description, default, **allowed.RANGES[key].bounds())


def _without_null(schema: dict[str, Any]) -> None:
    """Makes an optional field a plain field of the form, without a switch between two types."""
    for field in schema["properties"].values():
        if len(options := [option for option in field.get("anyOf", ()) if option != {"type": "null"}]) == 1:
            del field["anyOf"], field["default"]
            field |= options[0]


class Group(BaseModel):
    """A group of fields. `null` is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", regex_engine="python-re", json_schema_extra=_without_null)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
