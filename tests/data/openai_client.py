"""Checks a server with the official OpenAI client: `openai_client.py URL MODEL`. The API key is 'secret'."""
import sys

import openai

url, model = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0)
messages = [{"role": "user", "content": "Count from one to ten."}]


def raises(error, call, *words):
    try:
        call()
    except error as raised:
        text = str(raised)
        assert all(word in text for word in words), text
        return
    raise AssertionError(f"no {error.__name__}")


assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
chunks = list(client.chat.completions.create(
    model=model, messages=messages, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}))
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == whole.choices[0].message.content and text, (text, whole)
assert chunks[0].choices[0].delta.role == "assistant"
assert sum(1 for c in chunks if c.choices and c.choices[0].finish_reason) == 1
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24, chunks[-1]

two = client.chat.completions.create(
    model=model, messages=messages, n=2, seed=1, temperature=1, max_tokens=8, logprobs=True, top_logprobs=3)
assert len(two.choices) == 2 and two.choices[0].index == 0
for choice in two.choices:
    assert 1 <= len(choice.logprobs.content) <= 8, choice
    for token in choice.logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
again = client.chat.completions.create(model=model, messages=messages, n=2, seed=1, temperature=1, max_tokens=8)
assert [c.message.content for c in again.choices] == [c.message.content for c in two.choices]

stop = text[8:11]
stopped = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24, stop=[stop])
assert stopped.choices[0].finish_reason == "stop"
assert stopped.choices[0].message.content == text[:text.index(stop)], (stop, stopped)

plain = client.completions.create(model=model, prompt="The capital city of France is", temperature=0, max_tokens=4,
                                  logprobs=2, echo=True)
assert plain.choices[0].text.startswith("The capital city of France is Paris")
assert plain.choices[0].logprobs.token_logprobs[0] is None and len(plain.choices[0].logprobs.tokens) == 10
batch = client.completions.create(model=model, prompt=["One, two,", "A, B,"], temperature=0, max_tokens=4)
assert [c.index for c in batch.choices] == [0, 1]

create = client.chat.completions.create
raises(openai.BadRequestError, lambda: create(model=model, messages=messages, temperature=-1), "temperature")
raises(openai.BadRequestError, lambda: create(model=model, messages=messages, n=1 << 31), "n")
raises(openai.BadRequestError, lambda: create(model=model, messages=messages, max_tokens=1 << 20), "maximum context")
raises(openai.BadRequestError, lambda: create(model=model, messages=messages,
                                              response_format={"type": "json_object"}), "response_format")
raises(openai.NotFoundError, lambda: create(model="another", messages=messages), "another")
stranger = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
raises(openai.AuthenticationError, lambda: stranger.models.list())
print("all checks passed")
