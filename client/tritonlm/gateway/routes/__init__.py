"""The gateway's routes, one module per kind. Each handler parses the request, calls the client and responds."""

from . import jobs, messages, models, older, openai, playground, responses, scoring, tools, usage

ROUTERS = tuple(
    module.router for module in (openai, responses, messages, scoring, older, jobs, models, tools, usage, playground)
)
