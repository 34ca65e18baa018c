"""Agents of OpenAI's package `openai-agents`: a function tool, both APIs, streams, and an answer of a stated type.

python openai_agents.py URL MODEL
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

CONFIG = RunConfig(tracing_disabled=True)
# With "required" alone the model may call as often as it likes.
CALL = ModelSettings(temperature=0, max_tokens=120, tool_choice="required", parallel_tool_calls=False)
ANSWER = ModelSettings(temperature=0, max_tokens=120)
called: list[str] = []


@function_tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    called.append(city)
    return f"In {city} the sun shines."


class Place(BaseModel):
    kind: Literal["city", "river"]
    has_tower: bool


async def check(model: Any) -> None:
    caller: Agent = Agent(
        name="caller", instructions="Call tools.", model=model, tools=[weather], model_settings=CALL,
        tool_use_behavior="stop_on_first_tool",
    )  # fmt: skip
    called.clear()
    result = await Runner.run(caller, "What is the weather in Paris?", run_config=CONFIG)
    assert result.final_output == f"In {called[0]} the sun shines.", result.final_output

    called.clear()
    streamed = Runner.run_streamed(caller, "What is the weather in Paris?", run_config=CONFIG)
    events = [event.type async for event in streamed.stream_events()]
    assert streamed.final_output == f"In {called[0]} the sun shines."
    assert {"raw_response_event", "run_item_stream_event"} <= set(events)

    # The tool's result goes back to the model, which must not call again and answers by the schema.
    typed = caller.clone(output_type=Place, tools=[], model_settings=ANSWER)
    history = [*result.to_input_list(), {"role": "user", "content": "What kind of place is it?"}]
    answer = await Runner.run(typed, history, run_config=CONFIG)
    assert isinstance(answer.final_output, Place)
    assert answer.context_wrapper.usage.output_tokens > 0


async def main(url: str, model: str) -> None:
    set_tracing_disabled(True)
    async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=120) as client:
        await check(OpenAIChatCompletionsModel(model=model, openai_client=client))
        await check(OpenAIResponsesModel(model=model, openai_client=client))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
