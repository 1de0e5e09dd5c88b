"""Gateways: processes that let clients of other systems use a policy server.

A gateway speaks one foreign protocol on its own port and is an ordinary client of the server. One
foreign connection is one session. No foreign input is parsed in the server.
"""
