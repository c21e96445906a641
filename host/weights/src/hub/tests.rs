use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use tempfile::TempDir;

use super::*;
use crate::{Checkpoint, ModelPath, NoProgress, testing::safetensors_file};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A server with the interface of a hub: the list of a repository's files, the files (large ones through a redirect to a
/// store), and what it refuses.
struct FakeHub {
    endpoint: String,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Answered instead of the repository.
    refuse_with: Option<u16>,
    /// Only this token is let in.
    token: Option<String>,
    requests: Vec<String>,
    stopped: bool,
}

impl FakeHub {
    fn start(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let (shared, own_endpoint) = (state.clone(), endpoint.clone());
        let serve = move || {
            for stream in listener.incoming() {
                if shared.lock().unwrap().stopped {
                    return;
                }
                answer(stream.unwrap(), &mut shared.lock().unwrap(), &own_endpoint);
            }
        };
        Self { endpoint, state, thread: Some(std::thread::spawn(serve)) }
    }

    fn options(&self, folder: &TempDir) -> HubOptions {
        HubOptions {
            download_dir: folder.path().to_owned(),
            revision: "main".to_owned(),
            token: None,
            endpoint: self.endpoint.clone(),
            offline: false,
            config_only: false,
        }
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.state.lock().unwrap().stopped = true;
            // Wakes the listener up.
            drop(TcpStream::connect(self.endpoint.trim_start_matches("http://")));
            thread.join().unwrap();
        }
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.stop();
    }
}

fn answer(stream: TcpStream, state: &mut State, endpoint: &str) {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    let header = |name: &str| headers.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    state.requests.push(path.clone());
    let authorized =
        state.token.as_ref().is_none_or(|token| header("authorization") == Some(&format!("bearer {token}")));
    let (status, more, body) = match state.refuse_with {
        Some(status) => (status, String::new(), vec![]),
        None if !authorized => (401, String::new(), vec![]),
        None => resource(&path, header("range"), &state.files, endpoint),
    };
    let length = body.len();
    let head = format!("HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {length}\r\n{more}\r\n");
    let mut stream = &stream;
    // A client that goes away early is no failure of this server.
    let _sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
}

fn resource(
    path: &str,
    range: Option<&str>,
    files: &BTreeMap<String, Vec<u8>>,
    endpoint: &str,
) -> (u16, String, Vec<u8>) {
    if path == "/api/models/org/name/revision/main" || path == "/api/models/org/name/revision/v1%2Fx" {
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        return (
            200,
            String::new(),
            serde_json::to_vec(&serde_json::json!({"sha": COMMIT, "siblings": siblings})).unwrap(),
        );
    }
    let (prefix, is_store) = match path.starts_with("/store/") {
        true => ("/store/".to_owned(), true),
        false => (format!("/org/name/resolve/{COMMIT}/"), false),
    };
    let Some((name, bytes)) = path.strip_prefix(&prefix).and_then(|name| files.get_key_value(name)) else {
        return (404, String::new(), vec![]);
    };
    let etag =
        format!("{:x}", bytes.iter().fold(bytes.len() as u64, |sum, byte| sum.wrapping_mul(31) + u64::from(*byte)));
    if !is_store && !name.ends_with("json") {
        let more =
            format!("X-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{etag}\"\r\nLocation: {endpoint}/store/{name}\r\n");
        return (302, more, vec![]);
    }
    let (start, end) = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')).unwrap_or(("0", ""));
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |last: usize| last + 1);
    let range = format!("Content-Range: bytes {start}-{}/{}\r\n", end - 1, bytes.len());
    (206, format!("X-Repo-Commit: {COMMIT}\r\nETag: \"{etag}\"\r\n{range}"), bytes[start..end].to_vec())
}

fn fetch_text(text: &str, options: &HubOptions) -> Result<ResolvedModel, WeightsError> {
    ModelPath::resolve(text, options, &NoProgress)
}

fn failure(text: &str, options: &HubOptions) -> String {
    fetch_text(text, options).unwrap_err().to_string()
}

/// A repository with two shards, a file of each kind that is wanted, and some that are not.
fn sharded() -> FakeHub {
    let (one, two) = (safetensors_file(&[("a", &[1], &[1.0])]), safetensors_file(&[("b", &[1], &[2.0])]));
    FakeHub::start(&[
        ("config.json", b"{\"hidden_size\": 4}"),
        ("tokenizer.json", b"{}"),
        ("chat_template.jinja", b"{{ messages }}"),
        ("one.safetensors", &one),
        ("two.safetensors", &two),
        ("consolidated.safetensors", b"the same again"),
        ("pytorch_model.bin", b"pickled"),
        ("onnx/tokenizer.json", b"{}"),
        (INDEX_FILE, br#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#),
    ])
}

#[test]
fn a_folder_gets_the_files_it_needs_and_no_others() {
    let hub = sharded();
    let folder = tempfile::tempdir().unwrap();
    let model = fetch_text("org/name", &hub.options(&folder)).unwrap();
    let checkpoint = Checkpoint::open(&model).unwrap();
    assert_eq!(checkpoint.tensors().len(), 2);
    assert_eq!(checkpoint.config().unwrap()["hidden_size"], 4);
    let mut names: Vec<_> =
        fs::read_dir(model.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    let expected =
        ["chat_template.jinja", "config.json", INDEX_FILE, "one.safetensors", "tokenizer.json", "two.safetensors"];
    assert_eq!(names, expected);
    assert!(model.path().ends_with(format!("models--org--name/snapshots/{COMMIT}")));
}

#[test]
fn what_a_model_is_comes_without_its_weights_and_is_not_taken_for_the_model() {
    let (hub, folder) = (sharded(), tempfile::tempdir().unwrap());
    let options = HubOptions { config_only: true, ..hub.options(&folder) };
    let ResolvedModel::Folder(snapshot) = fetch_text("org/name", &options).unwrap() else { panic!() };
    let names: Vec<_> = snapshot.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["config.json"]);
    let offline = HubOptions { offline: true, config_only: false, ..options.clone() };
    assert!(failure("org/name", &offline).contains("lacks"), "the model itself was never here");
    fetch_text("org/name", &HubOptions { config_only: false, ..options.clone() }).unwrap();
    let offline = HubOptions { offline: true, ..options };
    assert_eq!(fetch_text("org/name", &offline).unwrap(), ResolvedModel::Folder(snapshot));
}

#[test]
fn files_already_there_are_not_fetched_again() {
    let hub = sharded();
    let folder = tempfile::tempdir().unwrap();
    let first = fetch_text("org/name", &hub.options(&folder)).unwrap();
    assert!(hub.requests().len() > 6);
    assert_eq!(fetch_text("org/name", &hub.options(&folder)).unwrap(), first);
    assert_eq!(hub.requests(), ["/api/models/org/name/revision/main"]);
}

#[test]
fn the_cache_serves_offline_and_when_the_hub_is_down() {
    let mut hub = sharded();
    let folder = tempfile::tempdir().unwrap();
    let online = hub.options(&folder);
    let offline = HubOptions { offline: true, ..online.clone() };
    let message = failure("org/name", &offline);
    assert!(
        message.contains("HF_HUB_OFFLINE is set") && message.contains("lacks everything of 'org/name'"),
        "{message}"
    );
    let model = fetch_text("org/name", &online).unwrap();
    hub.requests();
    assert_eq!(fetch_text("org/name", &offline).unwrap(), model);
    let by_commit = HubOptions { revision: COMMIT.to_owned(), ..offline.clone() };
    assert_eq!(fetch_text("org/name", &by_commit).unwrap(), model);
    assert!(
        failure("org/name", &HubOptions { revision: "other".to_owned(), ..offline.clone() })
            .contains("lacks everything")
    );
    assert_eq!(hub.requests(), [""; 0]);
    hub.stop();
    assert_eq!(fetch_text("org/name", &online).unwrap(), model);
    fs::remove_file(model.path().join("two.safetensors")).unwrap();
    fs::remove_file(model.path().join("config.json")).unwrap();
    assert!(failure("org/name", &offline).contains("lacks config.json, two.safetensors of 'org/name'"));
    let message = failure("org/name", &online);
    assert!(message.contains("cannot be reached") && message.contains("HF_HUB_OFFLINE=1"), "{message}");
}

#[test]
fn an_interrupted_download_is_not_found_offline() {
    let hub = sharded();
    let folder = tempfile::tempdir().unwrap();
    hub.state.lock().unwrap().files.get_mut(INDEX_FILE).unwrap().clear();
    hub.state
        .lock()
        .unwrap()
        .files
        .insert(INDEX_FILE.into(), br#"{"weight_map": {"a": "three.safetensors"}}"#.to_vec());
    let message = failure("org/name", &hub.options(&folder));
    assert!(message.contains("an index that names files it lacks: three.safetensors"), "{message}");
    let offline = HubOptions { offline: true, ..hub.options(&folder) };
    assert!(failure("org/name", &offline).contains("lacks everything"));
}

#[test]
fn a_gguf_file_comes_alone_and_from_any_revision() {
    let hub = FakeHub::start(&[("config.json", b"{}"), ("q4/m.gguf", b"GGUF and more"), ("other.gguf", b"x")]);
    let folder = tempfile::tempdir().unwrap();
    let options = HubOptions { revision: "v1/x".to_owned(), ..hub.options(&folder) };
    let model = fetch_text("org/name/q4/m.gguf", &options).unwrap();
    assert!(matches!(&model, ResolvedModel::Gguf(path) if fs::read(path).unwrap() == b"GGUF and more"));
    assert!(hub.requests().iter().all(|path| !path.contains("other") && !path.contains("config")));
    assert_eq!(fetch_text("org/name/q4/m.gguf", &HubOptions { offline: true, ..options.clone() }).unwrap(), model);
    let message = failure("org/name/none.gguf", &options);
    assert!(
        message.contains("'org/name' holds no none.gguf") && message.contains("other.gguf, q4/m.gguf"),
        "{message}"
    );
    let message = failure("org/name", &hub.options(&folder));
    assert!(message.contains("no safetensors") && message.contains("'org/name/file.gguf'"), "{message}");
}

#[test]
fn the_token_is_sent_and_refusals_name_the_remedy() {
    let hub = sharded();
    let folder = tempfile::tempdir().unwrap();
    hub.state.lock().unwrap().token = Some("hf_secret".to_owned());
    let message = failure("org/name", &hub.options(&folder));
    assert!(message.contains("HTTP 401") && message.contains("set HF_TOKEN"), "{message}");
    let with_token = HubOptions { token: Some("hf_secret".to_owned()), ..hub.options(&folder) };
    assert!(!format!("{with_token:?}").contains("hf_secret"));
    fetch_text("org/name", &with_token).unwrap();
    hub.state.lock().unwrap().refuse_with = Some(403);
    let message = failure("org/name", &with_token);
    assert!(message.contains("HTTP 403") && message.contains("the token may not read it"), "{message}");
}

#[test]
fn other_failures_are_told_apart() {
    let hub = sharded();
    let folder = tempfile::tempdir().unwrap();
    let message = failure("org/mistyped", &hub.options(&folder));
    assert!(message.contains("knows no model 'org/mistyped' at revision 'main'"), "{message}");
    hub.state.lock().unwrap().refuse_with = Some(503);
    assert!(failure("org/name", &hub.options(&folder)).contains("HTTP 503"));
    for revision in ["../x", "", "a//b", "/x", "a b", "x?y"] {
        let options = HubOptions { revision: revision.to_owned(), ..hub.options(&folder) };
        assert!(failure("org/name", &options).contains("no name of a revision"), "{revision}");
    }
    hub.requests();
    let (missing, local) = (folder.path().join("none"), folder.path().to_str().unwrap().to_owned());
    assert!(failure(missing.to_str().unwrap(), &hub.options(&folder)).contains("no such file or folder"));
    assert_eq!(fetch_text(&local, &hub.options(&folder)).unwrap(), ResolvedModel::Folder(folder.path().to_owned()));
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn options_come_from_the_environment() {
    let home = tempfile::tempdir().unwrap();
    let from = |vars: &[(&str, &str)]| {
        let vars: BTreeMap<_, _> = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        HubOptions::from_vars(|name| vars.get(name).cloned(), Some(home.path().to_owned()))
    };
    let plain = from(&[("HF_TOKEN", " "), ("HF_HUB_OFFLINE", "0")]);
    assert_eq!(plain.download_dir, home.path().join(".cache/huggingface/hub"));
    assert_eq!((plain.endpoint.as_str(), plain.revision.as_str()), ("https://huggingface.co", "main"));
    assert_eq!((plain.token, plain.offline), (None, false));
    let set = from(&[("HF_HOME", "/h"), ("HF_TOKEN", "t"), ("HF_ENDPOINT", "http://mirror"), ("HF_HUB_OFFLINE", "1")]);
    assert_eq!((set.download_dir.as_path(), set.endpoint.as_str()), (Path::new("/h/hub"), "http://mirror"));
    assert_eq!((set.token.as_deref(), set.offline), (Some("t"), true));
    assert_eq!(from(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).download_dir, Path::new("/c"));
    assert_eq!(from(&[("XDG_CACHE_HOME", "/x")]).download_dir, Path::new("/x/huggingface/hub"));
    fs::write(home.path().join("token"), "kept\n").unwrap();
    assert_eq!(from(&[("HF_HOME", home.path().to_str().unwrap())]).token.as_deref(), Some("kept"));
}

#[test]
fn a_retry_counts_no_byte_twice() {
    use hf_hub::api::Progress as _;
    #[derive(Default)]
    struct Sum(Mutex<(u64, u64)>);
    impl crate::Progress for Sum {
        fn begin(&self, _: &str, total: u64) {
            self.0.lock().unwrap().0 += total;
        }
        fn advance(&self, bytes: u64) {
            self.0.lock().unwrap().1 += bytes;
        }
        fn finish(&self) {}
    }
    let sum = Sum::default();
    let mut progress = FileProgress { inner: &sum, begun: false, done: 0, again: 0 };
    progress.init(100, "f");
    progress.init(100, "f");
    progress.update(0);
    progress.update(30);
    progress.init(100, "f");
    progress.update(30);
    progress.update(70);
    assert_eq!(*sum.0.lock().unwrap(), (100, 100));
}
