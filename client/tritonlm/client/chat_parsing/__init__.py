"""From a model's answer to content, reasoning and tool calls, while it is generated.

`events` are what parsers return; `parsers`, `keyword_parsers` and `harmony` read the formats, `reasoning` reads
`<think>`; `grammar` writes the grammars that make calls valid by construction; `tools` reads a caller's tools;
`profile` puts them together for one checkpoint and one chat. Pure Python: it knows no models, HTTP or connections.
"""
