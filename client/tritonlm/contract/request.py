"""The validated request that `tokenize` hands to `generate`, as one JSON tensor.

It holds the parameters and the requested kind of output; the prompt's ids are a separate tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from .errors import InvalidRequest
from .parameters import SamplingParameters


@dataclass(frozen=True)
class GenerationRequest:
    parameters: SamplingParameters
    stream: bool = False
    # The output text begins with the prompt (`echo`, or `exclude_input_in_output` false).
    include_prompt: bool = False
    # The output is the prompt's embedding instead of text.
    embed: bool = False

    def to_json(self) -> str:
        return json.dumps(
            {
                "parameters": self.parameters.to_mapping(),
                "stream": self.stream,
                "include_prompt": self.include_prompt,
                **({"embed": True} if self.embed else {}),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> GenerationRequest:
        try:
            fields = json.loads(text)
            parameters, stream, include = fields["parameters"], bool(fields["stream"]), bool(fields["include_prompt"])
            embed = bool(fields.get("embed", False))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(
                'request must be a JSON object with "parameters", "stream" and "include_prompt"', "request"
            ) from error
        return cls(SamplingParameters.from_mapping(parameters), stream, include, embed)
