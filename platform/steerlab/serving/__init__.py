"""Serve a model with its patch by OpenAI's chat API on this machine, for evaluation by any client of that API.

asked.py        requests: their fields, their limits, and the conversations that they describe
batches.py      the queue of requests, and the thread that continues them together
replies.py      answers, chunks of a stream and errors in OpenAI's shape
server.py       the HTTP server
"""
