"""Files and batches: JSONL with requests in, JSONL with answers out, beside interactive requests and after them.

`store` keeps both, `lines` reads and writes the files, `runner` runs the requests through the gateway's own routes.
"""
