//! Models from a hub (Hugging Face or another server with its interface), kept in the cache that its own tools use.
//!
//! A download is pinned to the commit that the revision names when it starts. The revision is recorded in the cache last,
//! so offline only complete downloads are found by it.

use std::{
    collections::BTreeSet,
    env, fmt, fs,
    path::{Path, PathBuf},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        RepoInfo,
        sync::{ApiBuilder, ApiError, ApiRepo},
    },
};

use crate::{
    Progress, ResolvedModel, WeightsError,
    error::list,
    safetensors::{self, INDEX_FILE, SINGLE_FILE},
};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";
/// After a connection breaks in the middle of a file.
const DOWNLOAD_RETRIES: usize = 3;

/// How to reach the hub.
#[derive(Clone, PartialEq, Eq)]
pub struct HubOptions {
    /// Where downloads are kept: `models--org--name/snapshots/…` in it.
    pub download_dir: PathBuf,
    /// Branch, tag or commit.
    pub revision: String,
    pub token: Option<String>,
    /// `https://huggingface.co`, or a mirror.
    pub endpoint: String,
    /// Use only what was downloaded before.
    pub offline: bool,
    /// Of a model that is no GGUF file, bring only `config.json`: what it is, without its weights.
    pub config_only: bool,
}

impl HubOptions {
    /// As the environment says: `HF_HUB_CACHE` or `HF_HOME`, `HF_TOKEN` (or the file where the hub's command line keeps
    /// it), `HF_ENDPOINT`, `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        Self::from_vars(|name| env::var(name).ok(), env::home_dir())
    }

    fn from_vars(get: impl Fn(&str) -> Option<String>, home: Option<PathBuf>) -> Self {
        let get = |name: &str| get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let path = |name: &str| get(name).map(PathBuf::from);
        let user_cache = || path("XDG_CACHE_HOME").unwrap_or_else(|| home.unwrap_or_default().join(".cache"));
        let hf_home = path("HF_HOME").unwrap_or_else(|| user_cache().join("huggingface"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
        let kept_token = || fs::read_to_string(token_file).ok().map(|token| token.trim().to_owned());
        let is_true = |value: &String| ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str());
        Self {
            download_dir: path("HF_HUB_CACHE").unwrap_or_else(|| hf_home.join("hub")),
            revision: DEFAULT_REVISION.to_owned(),
            token: get("HF_TOKEN").or_else(kept_token).filter(|token| !token.is_empty()),
            endpoint: get("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()),
            offline: get("HF_HUB_OFFLINE").as_ref().is_some_and(is_true),
            config_only: false,
        }
    }
}

impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("download_dir", &self.download_dir)
            .field("revision", &self.revision)
            .field("token", &self.token.as_ref().map(|_| "hidden"))
            .field("endpoint", &self.endpoint)
            .field("offline", &self.offline)
            .field("config_only", &self.config_only)
            .finish()
    }
}

/// Brings a model here: the file `gguf`, or what serving from safetensors needs.
pub(crate) fn fetch(
    repo: &str,
    gguf: Option<&str>,
    options: &HubOptions,
    progress: &dyn Progress,
) -> Result<ResolvedModel, WeightsError> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    if !options.revision.chars().all(is_allowed)
        || options.revision.split('/').any(|part| matches!(part, "" | "." | ".."))
    {
        let reason = format!("'{}' is no name of a revision", options.revision);
        return Err(WeightsError::NoSuchModel { text: repo.to_owned(), reason });
    }
    let hub = Hub { repo, gguf, options, progress, cache: Cache::new(options.download_dir.clone()) };
    if options.offline {
        return hub.cached();
    }
    match hub.download() {
        Err(unreachable @ WeightsError::HubUnreachable { .. }) => match hub.cached() {
            Ok(model) => {
                tracing::warn!("{unreachable}. Using the copy of '{repo}' in {}", options.download_dir.display());
                Ok(model)
            }
            Err(_) => Err(unreachable),
        },
        other => other,
    }
}

struct Hub<'a> {
    repo: &'a str,
    gguf: Option<&'a str>,
    options: &'a HubOptions,
    progress: &'a dyn Progress,
    cache: Cache,
}

impl Hub<'_> {
    fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.repo.to_owned(), RepoType::Model, revision.to_owned())
    }

    fn wants_config_only(&self) -> bool {
        self.options.config_only && self.gguf.is_none()
    }

    /// The folder of a commit's files.
    fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.repo(self.at(commit)).pointer_path(commit)
    }

    fn model(&self, snapshot: PathBuf) -> ResolvedModel {
        match self.gguf {
            Some(file) => ResolvedModel::Gguf(snapshot.join(file)),
            None => ResolvedModel::Folder(snapshot),
        }
    }

    fn cached(&self) -> Result<ResolvedModel, WeightsError> {
        let missing = match self.cached_snapshot() {
            None => vec!["everything".to_owned()],
            Some(snapshot) if self.wants_config_only() && snapshot.join("config.json").exists() => {
                return Ok(self.model(snapshot));
            }
            Some(snapshot) => match missing_files(&snapshot, self.gguf) {
                missing if missing.is_empty() => return Ok(self.model(snapshot)),
                missing => missing,
            },
        };
        Err(WeightsError::Offline {
            repo: self.repo.to_owned(),
            revision: self.options.revision.clone(),
            cache: self.options.download_dir.clone(),
            missing: list(missing.iter(), ", "),
        })
    }

    /// By the recorded commit of the revision, which may be a commit itself.
    fn cached_snapshot(&self) -> Option<PathBuf> {
        let revision = &self.options.revision;
        let repo_dir = self.options.download_dir.join(self.at(revision).folder_name());
        let recorded = fs::read_to_string(repo_dir.join("refs").join(revision)).ok();
        let commit = recorded.as_deref().map_or(revision.as_str(), str::trim);
        (is_commit(commit)).then(|| self.snapshot(commit)).filter(|snapshot| snapshot.is_dir())
    }

    fn download(&self) -> Result<ResolvedModel, WeightsError> {
        let options = self.options;
        let builder = ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(options.endpoint.trim_end_matches('/').to_owned())
            .with_token(options.token.clone())
            .with_retries(DOWNLOAD_RETRIES)
            .with_user_agent("torus", env!("CARGO_PKG_VERSION"));
        let api = builder.build().map_err(|error| self.failed(error))?;
        let RepoInfo { siblings, sha } =
            api.repo(self.at(&options.revision)).info().map_err(|error| self.failed(error))?;
        if !is_commit(&sha) {
            return Err(self.failed_because(format!("'{sha}' is no commit")));
        }
        let pinned = api.repo(self.at(&sha));
        let listed = siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let snapshot = self.snapshot(&sha);
        self.download_files(&pinned, &snapshot, &listed)?;
        if self.wants_config_only() {
            // By the record, whole models are found.
            return Ok(self.model(snapshot));
        }
        let recorded = self.cache.repo(self.at(&options.revision)).create_ref(&sha);
        recorded.map_err(|source| WeightsError::Io { path: options.download_dir.clone(), source })?;
        Ok(self.model(snapshot))
    }

    fn download_files(&self, api: &ApiRepo, snapshot: &Path, listed: &BTreeSet<String>) -> Result<(), WeightsError> {
        let lacks = |reason: String| WeightsError::HubFiles { repo: self.repo.to_owned(), reason };
        if let Some(file) = self.gguf {
            if !listed.contains(file) {
                return Err(lacks(format!("no {file}; {}", other_ggufs(listed))));
            }
            return self.download_file(api, snapshot, file);
        }
        if !listed.contains("config.json") {
            return Err(lacks(format!("no config.json; {}", other_ggufs(listed))));
        }
        if self.wants_config_only() {
            return self.download_file(api, snapshot, "config.json");
        }
        for file in listed.iter().filter(|file| is_side_file(file)) {
            self.download_file(api, snapshot, file)?;
        }
        if listed.contains(SINGLE_FILE) {
            return self.download_file(api, snapshot, SINGLE_FILE);
        }
        if !listed.contains(INDEX_FILE) {
            return Err(lacks(format!("no safetensors; {}", other_ggufs(listed))));
        }
        self.download_file(api, snapshot, INDEX_FILE)?;
        let shards: BTreeSet<_> = safetensors::read_index(&snapshot.join(INDEX_FILE))?.into_values().collect();
        let absent: Vec<_> = shards.difference(listed).collect();
        if !absent.is_empty() {
            return Err(lacks(format!("an index that names files it lacks: {}", list(absent.iter(), ", "))));
        }
        shards.iter().try_for_each(|shard| self.download_file(api, snapshot, shard))
    }

    fn download_file(&self, api: &ApiRepo, snapshot: &Path, file: &str) -> Result<(), WeightsError> {
        let path = snapshot.join(file);
        if path.exists() {
            return Ok(());
        }
        let progress = FileProgress { inner: self.progress, begun: false, done: 0, again: 0 };
        let downloaded = api.download_with_progress(file, progress);
        self.progress.finish();
        match downloaded {
            Ok(found) if found == path => Ok(()),
            Ok(found) => Err(self.failed_because(format!("{file} is of another commit: {}", found.display()))),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn failed(&self, error: ApiError) -> WeightsError {
        let endpoint = self.options.endpoint.clone();
        let repo = self.repo.to_owned();
        let ApiError::RequestError(error) = error else { return self.failed_because(error.to_string()) };
        match *error {
            ureq::Error::StatusCode(404) => {
                WeightsError::HubNotFound { endpoint, repo, revision: self.options.revision.clone() }
            }
            ureq::Error::StatusCode(status @ (401 | 403)) => {
                WeightsError::HubAccess { endpoint, repo, status, has_token: self.options.token.is_some() }
            }
            ureq::Error::StatusCode(status) => self.failed_because(format!("HTTP {status}")),
            ureq::Error::Io(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Timeout(_) => WeightsError::HubUnreachable { endpoint, reason: error.to_string() },
            other => self.failed_because(other.to_string()),
        }
    }

    fn failed_because(&self, reason: String) -> WeightsError {
        WeightsError::HubFailed { endpoint: self.options.endpoint.clone(), repo: self.repo.to_owned(), reason }
    }
}

/// What a folder lacks to be served from.
fn missing_files(snapshot: &Path, gguf: Option<&str>) -> Vec<String> {
    let missing = |name: &str| (!snapshot.join(name).exists()).then(|| name.to_owned());
    if let Some(file) = gguf {
        return missing(file).into_iter().collect();
    }
    let weights = match (missing(SINGLE_FILE), missing(INDEX_FILE)) {
        (None, _) => vec![],
        (Some(single), Some(_)) => vec![single],
        (Some(_), None) => match safetensors::read_index(&snapshot.join(INDEX_FILE)) {
            Ok(index) => {
                index.into_values().collect::<BTreeSet<_>>().iter().filter_map(|shard| missing(shard)).collect()
            }
            Err(_) => vec![INDEX_FILE.to_owned()],
        },
    };
    missing("config.json").into_iter().chain(weights).collect()
}

/// Files beside the weights that serving may need.
fn is_side_file(name: &str) -> bool {
    let known = [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ];
    let is_wanted = known.contains(&name) || name.starts_with("tokenizer") || name.starts_with("chat_template.");
    is_wanted && safetensors::is_file_name(name)
}

fn is_commit(text: &str) -> bool {
    (7..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// What to say when the wanted files are not there.
fn other_ggufs(listed: &BTreeSet<String>) -> String {
    let ggufs: Vec<_> = listed.iter().filter(|name| name.ends_with(".gguf")).collect();
    match ggufs.is_empty() {
        true => "it cannot be served from this hub model".to_owned(),
        false => format!("name one of its GGUF files as 'org/name/file.gguf': {}", list(ggufs.iter(), ", ")),
    }
}

/// Reports the download of a file; bytes that a retry skips are not counted again.
struct FileProgress<'a> {
    inner: &'a dyn Progress,
    begun: bool,
    done: usize,
    again: usize,
}

impl hf_hub::api::Progress for FileProgress<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        if !std::mem::replace(&mut self.begun, true) {
            self.inner.begin(&format!("downloading {filename}"), size as u64);
        }
        self.again = self.done;
    }

    fn update(&mut self, size: usize) {
        let known = size.min(self.again);
        self.again -= known;
        self.done += size - known;
        self.inner.advance((size - known) as u64);
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests;
