"""What requests say of the form of an answer, by OpenAI's name and by vLLM's names.

`response_format` is OpenAI's, `structured_outputs` is vLLM's, and `guided_json` and the like are
its older names. A request uses one of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from lorakit.data import strict_json
from lorakit.engine.grammar import Grammar
from lorakit.server.payload_parts import MAX_ITEMS, Payload, Replayed, Text

Schema = dict[str, Any] | Text
"""A JSON schema, as an object or as text."""
Choice = Annotated[list[Text], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]

_OBJECT = {"type": "object"}


class JsonSchema(Replayed):
    """A schema with its name; it is enforced whether `strict` is set or not."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Payload):
    """The form of an answer: any text, any JSON object, or JSON of a schema.

    `schema` beside `json_object` is how llama.cpp and LoRAX have a schema.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema goes with the type json_object; json_schema has its own")
        return self

    def grammar(self) -> Grammar | None:
        """The grammar of such answers; None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is not None:
            return Grammar.of_schema(self.json_schema.schema_)
        return Grammar.of_schema(_OBJECT if self.schema_ is None else self.schema_)


class StructuredOutputs(Payload):
    """vLLM's: one of `json` (a schema), `regex`, `choice`, `grammar` and `json_object`."""

    json_: Schema | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choice | None = None
    grammar_: Text | None = Field(None, alias="grammar")
    json_object: bool | None = None
    whitespace_pattern: None = None
    structural_tag: None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None

    def grammars(self) -> dict[str, Grammar]:
        """What is asked for, by the name of its field."""
        found: dict[str, Grammar] = {}
        if self.json_ is not None:
            found["json"] = of_schema(self.json_)
        if self.regex is not None:
            found["regex"] = Grammar("regex", self.regex)
        if self.choice is not None:
            found["choice"] = Grammar.of_choice(self.choice)
        if self.grammar_ is not None:
            found["grammar"] = Grammar("grammar", self.grammar_)
        if self.json_object:
            found["json_object"] = Grammar.of_schema(_OBJECT)
        return found


class FormFields(Payload):
    """The fields of a request that say what an answer must look like."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choice | None = None
    guided_grammar: Text | None = None
    guided_decoding_backend: str | None = Field(
        None, description="Accepted: there is one backend, llguidance."
    )

    _form: tuple[str, Grammar] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_form(self) -> FormFields:
        if len(found := self._forms()) > 1:
            raise ValueError(f"an answer has one form: give one of {' and '.join(found)}")
        self._form = next(iter(found.items()), None)
        return self

    def form(self) -> tuple[str, Grammar] | None:
        """The field that says what an answer must look like, and its grammar; None for any text."""
        return self._form

    def take_form(self, form: tuple[str, Grammar] | None) -> None:
        """Has answers another form, which was made of what else the request says."""
        self._form = form

    def _forms(self) -> dict[str, Grammar]:
        found: dict[str, Grammar] = {}
        if self.response_format is not None and (made := self.response_format.grammar()):
            found["response_format"] = made
        if self.structured_outputs is not None:
            given = self.structured_outputs.grammars()
            found |= {f"structured_outputs.{name}": made for name, made in given.items()}
        if self.guided_json is not None:
            found["guided_json"] = of_schema(self.guided_json)
        if self.guided_regex is not None:
            found["guided_regex"] = Grammar("regex", self.guided_regex)
        if self.guided_choice is not None:
            found["guided_choice"] = Grammar.of_choice(self.guided_choice)
        if self.guided_grammar is not None:
            found["guided_grammar"] = Grammar("grammar", self.guided_grammar)
        return found


def of_schema(schema: dict[str, Any] | str) -> Grammar:
    """The grammar of a schema that is given as an object or as text.

    Raises:
        ValueError: the text is no JSON object.
    """
    given = strict_json.parse(schema) if isinstance(schema, str) else schema
    if not isinstance(given, dict):
        raise ValueError("a schema is a JSON object")
    return Grammar.of_schema(given)
