//! Real programs, unchanged, with what they have to say about the mesh between them.

use std::fs;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use mesh_tests::ring::{Case, Mode, World, run};
use mesh_tests::traffic::PATIENCE;
use mesh_tests::{Mesh, MeshMode, Pod, Process, eventually};

struct Clients {
    world: World,
    client: Arc<Pod>,
    server: Arc<Pod>,
}

fn build() -> Clients {
    let mode = Mode::of_this_run();
    let mesh = Mesh::new().node("n1").node("n2");
    if mode.is_meshed() {
        mesh.manifests().label("clients", MeshMode::Enabled);
    }
    let client = mesh.pod("n1", "clients/client");
    let server = mesh.pod("n2", "clients/server");
    let world = World::start(mesh, mode, &[]);
    world.wait_enrolled(&[&client, &server]);
    Clients { world, client, server }
}

const CASES: &[Case<Clients>] = &[
    ("curl_and_nginx", curl_and_nginx),
    ("curl_keeps_connections_and_uploads", curl_keeps_connections_and_uploads),
    ("redis", redis),
    ("case_13_mariadb_greets_first", case_13_mariadb_greets_first),
    ("iperf3_both_directions", iperf3_both_directions),
    ("socat_passes_a_file", socat_passes_a_file),
    ("wrk_and_nginx", wrk_and_nginx),
];

fn main() -> ExitCode {
    run(build, |c| &c.world, CASES)
}

/// nginx on a port of the server's pod, with a page of 1 MiB and one that takes uploads.
fn nginx(c: &Clients, port: u16) -> Process {
    let folder = c.world.mesh().dir().join(format!("nginx-{port}"));
    fs::create_dir_all(folder.join("www")).unwrap();
    fs::write(folder.join("www/small"), "a small page").unwrap();
    fs::write(folder.join("www/big"), "0123456789abcdef".repeat(1 << 16)).unwrap();
    let dir = folder.display();
    let config = format!(
        "daemon off; user root; worker_processes 1; pid {dir}/pid; error_log stderr notice;\n\
         events {{ worker_connections 512; }}\n\
         http {{ access_log off; client_max_body_size 100m; client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy;\n\
         fastcgi_temp_path {dir}/fcgi; uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;\n\
         server {{ listen [::]:{port} ipv6only=off; root {dir}/www;\n\
         location /upload {{ proxy_pass http://127.0.0.1:{port}/small; proxy_method GET; }} }} }}\n",
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, config).unwrap();
    // The tests' folder may be closed to others; the worker runs as root too.
    let mut nginx = c.server.start("nginx", &["-c", &file.display().to_string()]);
    nginx.wait_for("start worker processes", PATIENCE);
    nginx
}

fn curl_and_nginx(c: &Clients) {
    let _nginx = nginx(c, 8080);
    for host in [c.server.v4().to_string(), format!("[{}]", c.server.v6())] {
        let url = format!("http://{host}:8080/small");
        let out = c.client.output("curl", &["-sS", "--max-time", "10", &url]).success();
        assert_eq!(out, "a small page");
    }
}

fn curl_keeps_connections_and_uploads(c: &Clients) {
    let _nginx = nginx(c, 8081);
    let base = format!("http://{}:8081", c.server.v4());
    let url = format!("{base}/big?[1-20]");
    let form = "%{num_connects} %{size_download}\n";
    let out = c.client.output("curl", &["-sS", "--max-time", "30", "-o", "/dev/null", "-w", form, &url]).success();
    let connects: u32 = out.lines().map(|line| line.split(' ').next().unwrap().parse::<u32>().unwrap()).sum();
    assert_eq!((out.lines().count(), connects), (20, 1), "one connection was kept for all: {out}");
    assert!(out.lines().all(|line| line.ends_with(" 1048576")), "{out}");

    let upload = c.world.mesh().dir().join("upload");
    fs::write(&upload, vec![b'u'; 8 << 20]).unwrap();
    let data = format!("@{}", upload.display());
    let url = format!("{base}/upload");
    let out = c.client.output("curl", &["-sS", "--max-time", "30", "--data-binary", &data, &url]).success();
    assert_eq!(out, "a small page");
}

fn redis(c: &Clients) {
    let port = "6379";
    let flags =
        ["--port", port, "--bind", "0.0.0.0", "::", "--save", "", "--appendonly", "no", "--protected-mode", "no"];
    let mut server = c.server.start("redis-server", &flags);
    server.wait_for("Ready to accept connections", PATIENCE);
    let host = c.server.v4().to_string();
    let cli = |args: &[&str]| c.client.output("redis-cli", &[&["-h", &host, "-p", port], args].concat()).success();
    assert_eq!(cli(&["set", "greeting", "hello"]).trim(), "OK");
    assert_eq!(cli(&["get", "greeting"]).trim(), "hello");
    // Pipelined: 10000 commands on the way at once, in order.
    let script = format!(
        "for i in $(seq 10000); do echo \"INCR n\"; done | redis-cli -h {host} -p {port} --pipe && \
         redis-cli -h {host} -p {port} get n"
    );
    let out = c.client.output("sh", &["-c", &script]).success();
    assert!(out.contains("errors: 0, replies: 10000") && out.trim_end().ends_with("10000"), "{out}");
}

fn case_13_mariadb_greets_first(c: &Clients) {
    let data = c.world.mesh().dir().join("mariadb");
    fs::create_dir_all(&data).unwrap();
    let dir = data.display().to_string();
    let install = ["--no-defaults", "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"];
    let datadir = format!("--datadir={dir}");
    c.server.output("mariadb-install-db", &[&install[..], &[&datadir]].concat()).success();
    let socket = format!("--socket={dir}/s");
    let pid = format!("--pid-file={dir}/pid");
    let flags = [
        "--no-defaults",
        "--user=root",
        "--bind-address=*",
        "--port=3306",
        "--skip-name-resolve",
        "--skip-grant-tables",
    ];
    let mut server =
        c.server.start("mariadbd", &[&flags[..], &["--skip-networking=0", &datadir, &socket, &pid]].concat());
    server.wait_for("ready for connections", Duration::from_secs(30));
    let host = format!("--host={}", c.server.v4());
    let query = ["--no-defaults", &host, "--port=3306", "--protocol=tcp", "--user=root", "--connect-timeout=10"];
    let out = c.client.output("mariadb", &[&query[..], &["-N", "-e", "select 6*7"]].concat()).success();
    assert_eq!(out.trim(), "42");
    server.stop();
}

fn iperf3_both_directions(c: &Clients) {
    let mut server = c.server.start("iperf3", &["-s", "-p", "5201", "--forceflush"]);
    server.wait_for("listening", PATIENCE);
    let host = c.server.v4().to_string();
    for direction in [&[][..], &["-R"], &["--bidir"]] {
        let args = [&["-c", &host, "-p", "5201", "-t", "1", "-P", "2", "-J"], direction].concat();
        let out = c.client.output("iperf3", &args).success();
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        let bytes = json["end"]["sum_received"]["bytes"].as_u64().unwrap_or_default();
        assert!(bytes > 10 << 20, "{direction:?}: {bytes} bytes in a second");
        eventually(PATIENCE, "iperf3 is ready for the next test", || {
            server.log().matches("Server listening").count() > server.log().matches("Accepted connection").count()
        });
    }
}

fn socat_passes_a_file(c: &Clients) {
    let dir = c.world.mesh().dir();
    let (sent, got) = (dir.join("sent"), dir.join("got"));
    let bytes = mesh_tests::traffic::Pattern::bytes(13, 3 << 20);
    fs::write(&sent, &bytes).unwrap();
    let to_file = format!("CREATE:{}", got.display());
    let mut server = c.server.start("socat", &["-d", "-d", "-u", "TCP-LISTEN:9000,reuseaddr", &to_file]);
    server.wait_for("listening on", PATIENCE);
    let from_file = format!("FILE:{}", sent.display());
    let to = format!("TCP:{}:9000", c.server.v4());
    c.client.output("socat", &["-u", &from_file, &to]).success();
    // It ends with the end of the stream, which must come after the last byte.
    assert!(server.wait(PATIENCE).success());
    assert!(fs::read(&got).unwrap() == bytes, "the file came as it was sent");
}

fn wrk_and_nginx(c: &Clients) {
    let _nginx = nginx(c, 8082);
    let url = format!("http://{}:8082/small", c.server.v4());
    let out = c.client.output("wrk", &["-t", "1", "-c", "16", "-d", "2s", &url]).success();
    assert!(!out.contains("Socket errors") && !out.contains("Non-2xx"), "{out}");
    assert!(out.contains("requests in"), "{out}");
}
