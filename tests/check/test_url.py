"""A running server is read over real HTTP: metrics of several versions, and every way an answer can go wrong."""

from __future__ import annotations

import gzip
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from check.local_server import TEXT, Answer, serving
from support import Ran

import kvplan
from kvplan.check import fetch
from kvplan.check.metrics import read_scrape, report_of
from kvplan.check.result import CheckResult, Term
from kvplan.errors import InputError, KvplanError, UnreachableError
from kvplan.terminal.check_view import show_check
from kvplan.terminal.plain import Page

START = Path(__file__).parent / "logs" / "vllm-0.31-llama-3.1-8b-a100.log"
MODELS = json.dumps(
    {"object": "list", "data": [{"id": "chat", "root": "llama-3.1-8b", "max_model_len": 32768}]}
).encode()


def vllm(itl_s: float = 0.0104, blocks: int = 28600, usage: str = "kv_cache_usage_perc",
         latency: str = "inter_token_latency_seconds", settings: str = "", requests: int = 100) -> bytes:  # fmt: skip
    """Metrics after ``requests`` requests of 2,048 prompt and 256 answer tokens, 16 of them at once."""
    labels = 'engine="0",model_name="chat"'
    tokens = requests * 255
    return f"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{labels}}} 16.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{{labels}}} 0.0
# TYPE vllm:{usage} gauge
vllm:{usage}{{{labels}}} 0.077
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",cache_dtype="auto",enable_prefix_caching="True",engine="0",\
gpu_memory_utilization="0.9",num_cpu_blocks="None",num_gpu_blocks="{blocks}",num_gpu_blocks_override="None"\
{settings}}} 1.0
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{{labels}}} {16.0 * tokens / 16}
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{{{labels},le="+Inf"}} {tokens / 16}
vllm:iteration_tokens_total_count{{{labels}}} {tokens / 16}
vllm:iteration_tokens_total_sum{{{labels}}} {tokens * 9.0}
# TYPE vllm:{latency} histogram
vllm:{latency}_bucket{{{labels},le="0.025"}} {tokens}
vllm:{latency}_bucket{{{labels},le="+Inf"}} {tokens}
vllm:{latency}_count{{{labels}}} {tokens}
vllm:{latency}_sum{{{labels}}} {tokens * itl_s}
# TYPE vllm:request_prompt_tokens histogram
vllm:request_prompt_tokens_count{{{labels}}} {requests}
vllm:request_prompt_tokens_sum{{{labels}}} {requests * 2048}
# TYPE vllm:request_generation_tokens histogram
vllm:request_generation_tokens_count{{{labels}}} {requests}
vllm:request_generation_tokens_sum{{{labels}}} {requests * 256}
# TYPE process_cpu_seconds counter
process_cpu_seconds_total 42.0
""".encode()


def server(metrics: bytes = b"", **paths: Answer) -> dict[str, Answer]:
    return {
        "/metrics": Answer(metrics or vllm()),
        "/v1/models": Answer(MODELS, content_type="application/json"),
        "/version": Answer(b'{"version": "0.11.0"}', content_type="application/json"),
        **paths,
    }


def term(result: CheckResult, name: str) -> Term:
    return next(term for term in result.terms if term.name == name)


def check(answers: dict[str, Answer], **options: Any) -> CheckResult:
    with serving(answers) as url:
        return kvplan.check_url(url, **{"gpu": "h100", **options})


def test_blocks_and_latency_of_a_running_server_are_held_against_the_plan() -> None:
    result = check(server())
    assert result.plan.request.engine_version == "0.11.0"
    assert result.plan.request.max_model_len_tokens == 32768
    blocks, itl = term(result, "num_blocks"), term(result, "itl_s")
    assert blocks.verdict == "agrees" and blocks.observed == 28600
    assert itl.observed == pytest.approx(0.0104) and itl.low is not None and itl.high is not None
    assert isinstance(itl.planned, float) and itl.low < itl.planned < itl.high
    shown = re.fullmatch(r"batch 16, context 2,176; 80% interval ([\d.]+) to ([\d.]+) ms", itl.note)
    assert shown is not None
    wide = check(server(), tolerance=0.9)
    assert term(wide, "itl_s").low < itl.low and term(wide, "itl_s").note == itl.note  # type: ignore[operator]


def test_a_latency_outside_the_interval_is_drift() -> None:
    slow = check(server(vllm(itl_s=0.104)))
    assert [t.name for t in slow.drifted] == ["itl_s"]


def test_blocks_that_fit_another_default_fraction_are_drift() -> None:
    """A third of the blocks gone is no rounding."""
    result = check(server(vllm(blocks=19000)))
    assert [t.name for t in result.drifted] == ["num_blocks"]


def test_older_metric_names_read_the_same() -> None:
    old = read_scrape(vllm(usage="gpu_cache_usage_perc", latency="time_per_output_token_seconds").decode(), "x")
    new = read_scrape(vllm().decode(), "x")
    reports = [report_of("x", scrape, None, [], {}) for scrape in (old, new)]
    assert [report.value("kv_usage") for report in reports] == [0.077, 0.077]
    assert reports[0].value("itl_s") == reports[1].value("itl_s") == pytest.approx(0.0104)


def test_two_readings_give_the_latency_of_the_time_between_them() -> None:
    """100 requests at 20 ms, then 100 more at 10 ms: the mean since the start is 15, of the time between 10."""
    first = read_scrape(vllm(itl_s=0.020).decode(), "x")
    last = read_scrape(vllm(itl_s=0.015, requests=200).decode(), "x")
    assert report_of("x", last, first, [], {}).value("itl_s") == pytest.approx(0.010)
    assert report_of("x", last, None, [], {}).value("itl_s") == pytest.approx(0.015)


def test_seconds_reads_the_server_twice() -> None:
    metrics = Answer(vllm(itl_s=0.104), then=Answer(vllm(itl_s=(0.104 + 0.0104) / 2, requests=200)))
    result = check(server(**{"/metrics": metrics}), seconds=0.05)
    assert term(result, "itl_s").observed == pytest.approx(0.0104)
    assert "between two scrapes" in term(result, "itl_s").where
    assert result.agrees


def test_sglang_reports_tokens_and_page_size() -> None:
    text = (
        b'# TYPE sglang:max_total_num_tokens gauge\nsglang:max_total_num_tokens{model_name="llama-3.1-8b"} 450000.0\n'
        b'# TYPE sglang:num_running_reqs gauge\nsglang:num_running_reqs{model_name="llama-3.1-8b"} 0.0\n'
        b'# TYPE sglang:page_size gauge\nsglang:page_size{model_name="llama-3.1-8b"} 1.0\n'
    )
    info = (
        b'{"version": "0.5.3", "model_path": "llama-3.1-8b", "tp_size": 2, "mem_fraction_static": 0.9, "dtype": "auto",'
        b'"dp_size": 2, "enable_dp_attention": true, "disable_radix_cache": true}'
    )
    result = check({"/metrics": Answer(text), "/get_server_info": Answer(info, content_type="application/json")})
    assert result.report.engine == "sglang"
    assert term(result, "capacity_tokens").observed == 450000
    assert (result.plan.request.tp_size, result.plan.request.gpu_memory_utilization) == (1, 0.9)
    assert (result.plan.request.dp_size, result.plan.request.enable_prefix_caching) == (2, False)
    assert result.report.value("engine_version") == "0.5.3"
    newer = info.replace(b'"dp_size": 2', b'"dp_size": 1, "attn_dp_size": 2')
    renamed = check({"/metrics": Answer(text), "/server_info": Answer(newer, content_type="application/json")})
    assert renamed.plan.request == result.plan.request


@pytest.mark.parametrize("path", ["", "/metrics", "/v1", "/v1/models"])
def test_any_page_of_the_server_leads_to_it(path: str) -> None:
    with serving(server()) as url:
        assert kvplan.check_url(url + path, gpu="h100").report.source == url


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(b"oops", 500), "HTTP 500"),
        (Answer(b"", 401), "HTTP 401"),
        (Answer(b"Not Found", 404), "HTTP 404"),
        (Answer(vllm(), cut=True), "broken answer"),
        (Answer(b"<html>Grafana</html>", content_type="text/html"), "a web page, not metrics"),
        (Answer(b'{"status": "ok"}', content_type="application/json"), "not Prometheus text"),
        (Answer(b"up 1\n"), "no vllm: or sglang: metric"),
        (Answer(b""), "no vllm: or sglang: metric"),
        (Answer(b"\xff\xfe\x00metrics"), "not text"),
        (Answer(b"not gzip", headers={"Content-Encoding": "gzip"}), "broken answer"),
        (
            Answer(b"", 302, headers={"Location": "http://example.invalid/metrics"}),
            "redirects to http://example.invalid",
        ),
        (Answer(b"", 302, headers={"Location": "http://xn--/metrics"}), "redirects to no address"),
        (Answer(b"", 302, headers={"Location": "http://127.0.0.1:99999/"}), "redirects to http://127.0.0.1:99999"),
        (Answer(b"", 302, headers={"Location": "/metrics"}), "redirects more than 3 times"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_answer_is_one_line_and_exit_2(answer: Answer, says: str) -> None:
    with pytest.raises(InputError) as error:
        check(server(**{"/metrics": answer}))
    assert says in error.value.message and "\n" not in error.value.message


def test_gzip_is_read_and_a_redirect_within_the_server_is_followed() -> None:
    moved = Answer(b"", 302, headers={"Location": "/inner/metrics"})
    answers = server(**{"/metrics": moved, "/inner/metrics": Answer(vllm(), gzipped=True)})
    assert term(check(answers), "num_blocks").observed == 28600


def test_encodings_on_top_of_each_other_are_refused() -> None:
    """Two kilobytes could unpack to gigabytes."""
    packed = gzip.compress(gzip.compress(b"#" * 2**20))
    spoilt = Answer(packed, headers={"Content-Encoding": "gzip, gzip"})
    with pytest.raises(InputError, match="encoded as gzip, gzip"):
        check(server(**{"/metrics": spoilt}))


def test_a_line_that_would_take_minutes_to_parse_is_refused() -> None:
    labels = ",".join(f'a{i}="b"' for i in range(100_000))
    with pytest.raises(InputError, match="a line of more than"):
        check(server(f"vllm:x{{{labels}}} 1\n".encode()))


def test_a_password_in_the_address_is_used_and_never_shown() -> None:
    with serving(server(), key="me:secret") as url:
        assert "secret" not in kvplan.check_url(url.replace("//", "//me:secret@"), gpu="h100").to_json()
        with pytest.raises(InputError, match="HTTP 401") as error:
            kvplan.check_url(url.replace("//", "//me:wrong@"), gpu="h100")
    assert "wrong" not in error.value.message


def test_what_a_server_calls_itself_cannot_write_to_the_terminal() -> None:
    version = Answer(json.dumps({"version": "0.11.0\x1b]0;x\x07"}).encode(), content_type="application/json")
    metrics = vllm().replace(b'cache_dtype="auto"', b'cache_dtype="fp\x1b[31m8"')
    result = check(server(metrics, **{"/version": version}), kv_cache_dtype="fp8")
    shown = io.StringIO()
    show_check(Page(shown), result)
    assert "0.11.0?]0;x?" in shown.getvalue() and "fp?[31m8" in shown.getvalue()
    assert not {"\x1b", "\x07"} & {*shown.getvalue()}


def test_of_several_engines_the_batch_is_that_of_one_and_the_smallest_cache_counts() -> None:
    """16 and 8 requests run in two engines: 12 in each of them on average."""
    second = vllm(blocks=20000).decode().replace('engine="0"', 'engine="1"').replace("} 16.0", "} 8.0")
    both = "\n".join(line for line in (vllm().decode() + second).splitlines() if "iteration_tokens" not in line)
    report = report_of("x", read_scrape(both, "x"), None, [], {})
    assert (report.value("running_requests"), report.value("batch_size"), report.value("num_blocks")) == (24, 12, 20000)


def test_an_answer_larger_than_metrics_can_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BODY_BYTES", 2**16)
    with pytest.raises(InputError, match="not metrics"):
        check(server(b"# " + b"x" * 2**17 + b"\n"))
    with pytest.raises(InputError, match="not metrics"):
        check(server(**{"/metrics": Answer(b"# " + b"x" * 2**20 + b"\n", gzipped=True)}))


@pytest.mark.parametrize("answer", [Answer(vllm(), wait_s=3), Answer(vllm(), drip_s=0.05)], ids=["silent", "drip-fed"])
def test_a_slow_server_is_given_up_on_in_time(answer: Answer) -> None:
    began = time.monotonic()
    with serving(server(**{"/metrics": answer})) as url, pytest.raises(UnreachableError):
        kvplan.check_url(url, gpu="h100", timeout_s=0.5)
    assert time.monotonic() - began < 5


def test_without_models_or_version_metrics_alone_do() -> None:
    answers = {"/metrics": Answer(vllm(), content_type=TEXT)}
    assert term(check(answers, model="llama-3.1-8b", max_model_len_tokens=32768), "num_blocks").verdict == "agrees"
    with pytest.raises(InputError, match="the server's model 'chat' is not known here"):
        check(answers)


def test_a_server_that_is_not_there_is_exit_4() -> None:
    with serving({}) as url:
        pass
    with pytest.raises(UnreachableError, match="cannot be reached") as error:
        kvplan.check_url(url, gpu="h100")
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    "url",
    ["ftp://host", "http://", "http://host:99999999", "http://host:65536", "http://xn--", "not an address at all", ""],
)
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(KvplanError) as error:
        kvplan.check_url(url, gpu="h100")
    assert "\n" not in error.value.message


def test_tls_that_is_not_trusted_is_one_line_and_trusted_when_named(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    key, chain, root = tmp_path / "key.pem", tmp_path / "chain.pem", tmp_path / "root.pem"
    issued.private_key_pem.write_to_path(key)
    for certificate in issued.cert_chain_pems:
        certificate.write_to_path(chain, append=True)
    authority.cert_pem.write_to_path(root)
    with serving(server(), (str(chain), str(key))) as url:
        with pytest.raises(UnreachableError, match="TLS failed") as error:
            kvplan.check_url(url, gpu="h100")
        assert "\n" not in error.value.message
        assert term(kvplan.check_url(url, gpu="h100", ca_file=str(root)), "num_blocks").verdict == "agrees"
        with pytest.raises(InputError, match="no certificates can be read"):
            kvplan.check_url(url, gpu="h100", ca_file=str(tmp_path / "absent.pem"))


def test_the_command_ends_with_the_documented_exit_codes(kvplan_cli: Callable[..., Ran], tmp_path: Path) -> None:
    with serving(server()) as url:
        fine = kvplan_cli("check", "--url", url, "--gpu", "h100")
    assert (fine.code, fine.err) == (0, "")
    assert "AGREES" in fine.out and "inter-token latency" in fine.out
    with serving(server(vllm(blocks=100))) as url:
        drifted = kvplan_cli("check", "--url", url, "--gpu", "h100", "--json")
    assert drifted.code == 3 and drifted.json["verdict"] == "drifted"
    assert drifted.err == "error: the server drifted from the plan: blocks\n"
    with serving(server()) as url:
        unnamed = kvplan_cli("check", "--url", url)
    assert unnamed.code == 1 and "INCONCLUSIVE: 1 term" in unnamed.out and "name the GPU with --gpu" in unnamed.err
    assert kvplan_cli("check", "--url", url, "--gpu", "h100").code == 4
    for words in (["check"], ["check", "--url", url, "--log", "x"], ["check", "--log", str(tmp_path / "absent.log")],
                  ["check", "--log", str(tmp_path)], ["check", "--url", url, "--tolerance", "700"]):  # fmt: skip
        wrong = kvplan_cli(*words)
        assert wrong.code in (2, 4) and wrong.err.count("\n") == 1 and wrong.out == "", wrong


def test_a_key_is_taken_from_the_environment_only(kvplan_cli: Callable[..., Ran]) -> None:
    with serving(server(), key="secret") as url:
        words = ("check", "--url", url, "--gpu", "h100")
        assert kvplan_cli(*words, env={"KVPLAN_API_KEY": "secret"}).code == 0
        refused = kvplan_cli(*words)
    assert refused.code == 2 and "set KVPLAN_API_KEY" in refused.err and "secret" not in refused.err


def test_a_scenario_states_what_was_planned(kvplan_cli: Callable[..., Ran], tmp_path: Path) -> None:
    scenario = tmp_path / "chat.yaml"
    scenario.write_text("model: 8b\ngpu: h100\ntp: 1\nctx: 32k\nkv_cache_dtype: fp8\ncompare: bf16,fp8\n")
    with serving(server()) as url:
        done = kvplan_cli("check", "--url", url, "--scenario", str(scenario))
    assert done.code == 3
    assert "KV dtype: fp8 was planned, the server runs" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("lengths", "context"),
    [
        ("isl: 8k\nosl: 1k", 9216),
        ("ctx: 12k\nisl: 8k\nosl: 1k", 12288),
        ("input_tokens: 4096\noutput_tokens: 64", 4160),
    ],
)
def test_prompt_and_answer_of_a_scenario_are_its_context_as_in_a_report(
    kvplan_cli: Callable[..., Ran], tmp_path: Path, lengths: str, context: int
) -> None:
    """460,496 tokens hold 12 requests of 9,216, and 3 of the 131,072 the server allows."""
    scenario = tmp_path / "chat.yaml"
    scenario.write_text(f"model: 8b\ngpu: a100-80gb-sxm\nconcurrency: 12\n{lengths}\n")
    done = kvplan_cli("check", "--log", str(START), "--scenario", str(scenario), "--json")
    assert done.code == 0 and done.json["request"]["context_tokens"] == context
    [held] = [term for term in done.json["terms"] if term["name"] == "batch_size"]
    assert held["planned"] == 12 <= held["observed"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("isl: 8k", "a load needs output_tokens too"),
        ("isl: 8k\nosl: 1k\nctx: 4k", "isl and osl are longer than the ctx of 4k"),
        ("isl: many\nosl: 1k", "input_tokens"),
        ("tp: 1\ntp_size: 2", "tp and tp_size mean the same"),
        ("contxt: 8k", "unknown report field 'contxt'"),
    ],
)
def test_a_scenario_that_cannot_be_meant_is_one_line_and_exit_2(
    kvplan_cli: Callable[..., Ran], tmp_path: Path, fields: str, says: str
) -> None:
    scenario = tmp_path / "chat.yaml"
    scenario.write_text(f"model: 8b\n{fields}\n")
    wrong = kvplan_cli("check", "--log", str(START), "--scenario", str(scenario))
    assert wrong.code == 2 and says in wrong.err and wrong.err.count("\n") == 1 and wrong.out == ""


def test_the_commands_of_the_readme_run(kvplan_cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:  # fmt: skip
    """With an example's log, a scenario of the fields that README names, and a server here for the one it names."""
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text()
    block = re.search(r"## Check a server\n.*?```sh\n(.*?)```", text, re.S)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vllm.log").write_bytes((root / "examples" / "vllm-startup.log").read_bytes())
    (tmp_path / "chat.yaml").write_text("model: 8b\ngpu: h100\ntp: 1\n")
    with serving(server()) as url:
        for line in block[1].splitlines():
            words = line.split("#")[0].replace("http://host:8000", url).split()
            assert words[0] == "kvplan"
            done = kvplan_cli(*words[1:])
            assert done.code in (0, 3) and done.out, (line, done.err)
