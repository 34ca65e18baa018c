"""The gateway's routes, one module per kind. Each handler parses the request, calls the client and responds."""

from . import jobs, models, older, openai, playground, tools, usage

ROUTERS = tuple(module.router for module in (openai, older, jobs, models, tools, usage, playground))
