#!/usr/bin/env bash
# huggingface_hub 2.4.0: downloading one file from a hub of one's own first asks that hub for a list of AI agents, in every process.
#
# Seen: with HF_ENDPOINT set and an empty HF_HOME, hf_hub_download sends GET /api/agent-harnesses before anything of the repository,
# and without the token that all other requests carry. A hub that has no such address answers 404, which is not remembered: the next
# process asks again. A program that counts requests, or a proxy that wants a token on each, meets one more than it expects.
# Expected: requests for the file alone, all of them with the token.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --root-user-action=ignore huggingface_hub==2.4.0
cat > "$folder/serve.py" <<'EOF'
import http.server
import pathlib
import subprocess
import sys
import threading

COMMIT, CONTENT, asked = "0123456789abcdef0123456789abcdef01234567", b"{}", []
DOWNLOAD = "from huggingface_hub import hf_hub_download; print(open(hf_hub_download('me/mine', 'config.json')).read())"


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        asked.append((self.path, self.headers.get("Authorization")))
        found = self.path.endswith("/config.json")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(CONTENT) if found else 0))
        for name, value in {"ETag": '"abc"', "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.end_headers()
        return found

    def do_GET(self):
        if self.do_HEAD():
            self.wfile.write(CONTENT)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
folder = pathlib.Path(sys.argv[1])
agents = []
for run in range(2):
    asked.clear()
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / f"cache{run}"), "HF_TOKEN": "hf_secret"}
    environment = home | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", DOWNLOAD], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n", done
    print(*asked, sep="\n", end="\n\n")
    agents.append([token for path, token in asked if path == "/api/agent-harnesses"])
    assert asked[0][0] == "/api/agent-harnesses"
    assert all(token == "Bearer hf_secret" for path, token in asked if "/me/mine/" in path)
assert agents == [[None], [None]], agents
print("as described")
EOF
"$folder/venv/bin/python" "$folder/serve.py" "$folder"
