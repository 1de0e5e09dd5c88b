"""Policies that another system's server computes: its protocol, behind the ``Policy`` interface.

What the server answers is untrusted input: its length is bounded before anything is built of it.
"""
