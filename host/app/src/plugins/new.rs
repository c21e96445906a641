//! `torus plugins new`.

use std::path::{Path, PathBuf};

use torus_scaffold::{Kind, Name, Project};

use crate::args::{PluginKind, PluginsNewArgs};

pub fn run(args: &PluginsNewArgs) -> anyhow::Result<()> {
    let name = Name::new(&args.name).map_err(torus_scaffold::ScaffoldError::from)?;
    let kind = match args.kind {
        PluginKind::Model => Kind::Model,
        PluginKind::Attention => Kind::Attention,
        PluginKind::Speculative => Kind::Speculative,
    };
    let folder = args.path.clone().unwrap_or_else(|| PathBuf::from(&args.name));
    let project = torus_scaffold::create(kind, &name, &folder, args.api.as_deref())?;
    print!("{}", report(&project));
    Ok(())
}

/// What was written, and the commands to type next.
fn report(project: &Project) -> String {
    let mut text = format!("wrote {}\n", project.folder.display());
    if let Some(api) = &project.api {
        text += &format!("wrote {} (the plugin API)\n", api.display());
    }
    text += "\nnext:\n";
    if project.folder != Path::new(".") {
        text += &format!("  cd {}\n", project.folder.display());
    }
    project.commands.lines().for_each(|line| text += &format!("  {line}\n"));
    text
}
