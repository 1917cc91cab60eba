"""LangChain with a Seraph server: a chain whole and streamed, and texts found by their vectors.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/langchain_python.py
"""

from __future__ import annotations

import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import OpenAI
from pydantic import SecretStr

TEXTS = ["Rivers carry water to the sea.", "Bread is baked from flour.", "A mountain is a large hill."]


def main() -> None:
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000") + "/v1"
    api_key = SecretStr(os.environ.get("SERAPH_API_KEY", "none"))
    with OpenAI(base_url=base_url, api_key=api_key.get_secret_value()) as client:
        models = {model.to_dict()["kind"]: model.id for model in reversed(client.models.list().data)}

    chat = ChatOpenAI(model=models["generate"], base_url=base_url, api_key=api_key, temperature=0, max_tokens=20)
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")]) | chat
    question = {"question": "Tell me the capital of France."}
    answer = chain.invoke(question)
    print("whole:", repr(answer.content))
    print("tokens:", answer.usage_metadata["output_tokens"])
    print("streamed:", repr("".join(str(chunk.content) for chunk in chain.stream(question))))

    if "embed" not in models:
        print("no embedding model is served: start one with --embedding-model")
        return
    # Without check_embedding_ctx_length=False, token ids of OpenAI's own models are sent in place of the texts.
    embeddings = OpenAIEmbeddings(
        model=models["embed"], base_url=base_url, api_key=api_key, check_embedding_ctx_length=False
    )
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    print("found:", store.similarity_search(TEXTS[1], k=1)[0].page_content)


if __name__ == "__main__":
    main()
