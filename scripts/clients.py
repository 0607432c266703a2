#!/usr/bin/env python3
"""Runs a server example under 64 clients at once and holds its answers against the Rust example's.

    scripts/clients.py EXPECTED.json -- SERVER [ARGUMENT...]

EXPECTED.json is what `generate --json` wrote for ragged prompts. The server is started on a port of
its choice, which its first line names ("listening on http://127.0.0.1:PORT"). Each client asks for
one prompt, as JSON or as server-sent events; every fifth hangs up half-way. Then: bad requests are
refused, the metrics add up, and on SIGTERM the server ends with status 0 and says by its last line
that its cache holds nothing. Python's standard library is all it needs.
"""

import http.client
import json
import signal
import subprocess
import sys
import threading

CLIENTS = 64


def ask(port, body, stream_until=None):
    """One request. With stream_until: reads so many events, then hangs up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/generate", text,
                       {"Content-Type": "application/json", "Connection": "close"})
    response = connection.getresponse()
    if response.getheader("Content-Type") != "text/event-stream":
        answer = response.status, json.loads(response.read())
        connection.close()
        return answer
    pieces, tokens, last = [], [], None
    for line in response:
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line[6:])
        if event.get("done"):
            last = event
            break
        pieces.append(event["text"])
        tokens.append(event["token"])
        if stream_until is not None and len(tokens) == stream_until:
            connection.close()
            return response.status, None
    connection.close()
    assert last is not None, "the stream broke off"
    assert tokens == last["tokens"], "the last event has other tokens than the stream"
    # A character that the end cut off is only in the last event.
    assert last["text"].startswith("".join(pieces)), "the last event has another text"
    return response.status, {"text": last["text"], "tokens": tokens}


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Connection": "close"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.status == 200, f"{path}: {response.status}"
    return text


def metric(text, name):
    values = [line.split()[-1] for line in text.splitlines()
              if line.split("{")[0].split(" ")[0] == name]
    assert values, f"/metrics has no {name}"
    return sum(map(float, values))


def main():
    expected_path, dashes, *command = sys.argv[1:]
    assert dashes == "--" and command, __doc__
    with open(expected_path, encoding="utf-8") as file:
        expected = json.load(file)["sequences"]
    most = max(len(sequence["tokens"]) for sequence in expected)
    server = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    failed = []
    try:
        line = server.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), f"the server said {line!r}"
        port = int(line.rsplit(":", 1)[1])
        assert get(port, "/health") == "ok\n"

        together = threading.Barrier(CLIENTS)

        def client(number):
            sequence = expected[number % len(expected)]
            body = {"prompt": sequence["prompt"], "max_tokens": most, "stream": number % 2 == 0}
            # Some are of another tenant: nothing is shared with them, and the answer is the same.
            if number % 3 == 0:
                body["tenant"] = 7
            until = None
            if number % 5 == 4:
                body["stream"], until = True, 1 + number % 7
            try:
                together.wait()
                status, answer = ask(port, body, until)
                if answer is not None:
                    assert status == 200, f"status {status}: {answer}"
                    assert answer["tokens"] == sequence["tokens"], (
                        f"tokens {answer['tokens']}, not {sequence['tokens']}")
                    assert answer["text"] == sequence["text"], answer["text"]
            except Exception as error:  # Whatever it is, it is told with the client's number.
                failed.append(f"client {number}: {error!r}")

        clients = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert not failed, "\n".join(failed)
        hung_up = sum(n % 5 == 4 for n in range(CLIENTS))

        for body in (b"", b"{", b"[1]", {}, {"prompt": 3}, {"prompt": "x", "max_tokens": 0},
                     {"prompt": "x", "temperature": -1}, {"prompt": "x", "colour": 1},
                     {"prompt": "x " * 5000}, b'{"prompt": "\xff"}'):
            status, answer = ask(port, body)
            assert status == 400 and answer["error"], f"{body!r} gave {status}"

        metrics = get(port, "/metrics")
        finished = metric(metrics, "server_requests_finished_total")
        cancelled = metric(metrics, "server_requests_cancelled_total")
        assert finished >= CLIENTS - hung_up, f"{finished} finished"
        hits = metric(metrics, "kvcache:prefix_cache_hits_total")
        assert hits > 0, "no prefix was shared"

        # One that is being answered while the server is told to end gets its whole answer.
        late = {}
        body = {"prompt": expected[0]["prompt"], "max_tokens": most, "stream": True}
        thread = threading.Thread(target=lambda: late.update(answer=ask(port, body)))
        thread.start()
        while not late and metric(get(port, "/metrics"), "server_requests_running") == 0:
            pass
        server.send_signal(signal.SIGTERM)
        thread.join()
        assert late["answer"][1]["tokens"] == expected[0]["tokens"], "cut off by the end"
        said = server.stdout.read().strip()
        status = server.wait(timeout=60)
        assert status == 0 and json.loads(said)["audit"] == "ok", f"status {status}: {said}"
    finally:
        server.kill()
    print(f"{CLIENTS} clients, {hung_up} hung up, {cancelled:.0f} cancelled, "
          f"{hits:.0f} prompt tokens found; {said}")


if __name__ == "__main__":
    main()
