"""Anthropic's Messages API over chats: content blocks become a chat, and a chat's chunks become blocks and events.

It knows both formats. Models, HTTP and the engine stay outside.
"""
