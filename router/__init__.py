"""The gateway: OpenAI's HTTP interface in front of prefill and decode workers.

server.py      the process: listens, follows the fleet, drains
app.py         build_app(service): routes; endpoint.py serves the two hot ones; http.py bodies, errors, keys
openai_types.py what clients send; sampling.py and prompts.py turn it into Requests; openai_json.py what they get
service.py     life of a request; stream.py and journal.py one choice of it; mailbox.py towards the HTTP task
placement.py   which workers; registry.py who is there; clients.py the seam to the connection
tokenizer.py, chat_template.py, detokenizer.py, stop_strings.py   text; segments.py and words.py what was encoded before
metrics.py     Prometheus
"""
