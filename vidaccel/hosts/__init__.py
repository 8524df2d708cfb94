"""The supported transformer classes, a row each, and how a model of one's own joins them."""

from vidaccel.hosts.registry import HOSTS, find_transformers, markdown_table, register_host
from vidaccel.hosts.spec import BlockList, Head, HostSpec

__all__ = [
    "HOSTS",
    "BlockList",
    "Head",
    "HostSpec",
    "find_transformers",
    "markdown_table",
    "register_host",
]
