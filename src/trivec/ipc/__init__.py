"""Requests of several API processes to the one engine process, over ZeroMQ on this machine."""
