#!/bin/sh
# Talk to a server with curl: what is served, one answer, one streamed answer, one call of a tool.
#
#   SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... sh clients/examples/curl.sh
set -eu

url=${SERAPH_BASE_URL:-http://127.0.0.1:8000}
key=${SERAPH_API_KEY:-none}

ask() {
    path=$1
    shift
    curl --silent --show-error --fail-with-body --no-buffer "$url$path" \
        -H "authorization: Bearer $key" -H 'content-type: application/json' "$@"
}

models=$(ask /v1/models)
echo "$models"
model=$(printf %s "$models" | grep -o '"id": *"[^"]*"' | head -n 1 | cut -d '"' -f 4)  # the server's first

messages='[{"role": "user", "content": "Tell me the capital of France."}]'
ask /v1/chat/completions -d "{\"model\": \"$model\", \"messages\": $messages, \"temperature\": 0, \"max_tokens\": 20}"
echo
ask /v1/chat/completions \
    -d "{\"model\": \"$model\", \"messages\": $messages, \"temperature\": 0, \"max_tokens\": 20, \"stream\": true}"
weather='[{"role": "user", "content": "What is the weather in Oslo?"}]'
parameters='{"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo", "Lima"]}},
    "required": ["city"], "additionalProperties": false}'
tools="[{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"parameters\": $parameters}}]"
ask /v1/chat/completions \
    -d "{\"model\": \"$model\", \"messages\": $weather, \"tools\": $tools, \"tool_choice\": \"required\",
         \"parallel_tool_calls\": false, \"temperature\": 0, \"max_tokens\": 200}"
echo
