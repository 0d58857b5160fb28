"""Asks the demo model questions: ``python -m examples.demo_model.sample [QUESTION ...]``; on the CPU, with torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3ForCausalLM,
)

from examples.demo_model.tokenizer import END_OF_TEXT_ID, IM_END_ID

QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What does json.dumps do?",
    "What is a generator?",
    "What does os.path.join do?",
    "Explain list comprehensions.",
    "What is the difference between a list and a tuple?",
    "How do I read a file?",
    "What does random.shuffle do?",
    "What is the pathlib module?",
    "What does str.split do?",
    "Why does Python use indentation for grouping of statements?",
    "How do I sort a list of dictionaries?",
    "What is Baton?",
    "What is the weather like?",
)


def answer(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str, temperature: float) -> str:
    """The model's reply to one question; temperature 0 is greedy."""
    messages = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=160,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_p=0.9 if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        eos_token_id=[IM_END_ID, END_OF_TEXT_ID],
        pad_token_id=END_OF_TEXT_ID,
    )
    output = model.generate(prompt, generation_config=config)  # type: ignore[misc]
    return str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS))
    parser.add_argument("--model", type=Path, default=Path("deploy/demo_model"))
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = Qwen3ForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    for question in arguments.questions:
        reply = answer(model, tokenizer, question, arguments.temperature)
        sys.stdout.write(f"> {question}\n{reply}\n\n")


if __name__ == "__main__":
    main()
