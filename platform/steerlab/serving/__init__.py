"""Serve a model with its patch behind the chat API of OpenAI, on this machine, for evaluation by anybody's client.

asked.py        requests: what is read of them, their limits, and the conversation that they stand for
served_rows.py  a batch of rows with their own strengths and sampling, continued token by token
batches.py      requests that wait, and the thread that runs them in batches
replies.py      answers, chunks of a stream and errors in OpenAI's shape
server.py       the HTTP server
"""
