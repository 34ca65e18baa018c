"""OpenAI's Responses API over chats: input items become a chat, and a chat's chunks become output items and events.

It knows both formats. Models, HTTP and the engine stay outside.
"""
