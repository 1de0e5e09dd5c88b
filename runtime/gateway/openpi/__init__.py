"""The gateway for clients of openpi: MessagePack over a websocket."""
