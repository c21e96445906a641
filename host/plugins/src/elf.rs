//! What can be told of a library before it is mapped: that it is whole, for this machine, and has a plugin's root.
//!
//! The system's loader runs a library's constructors, maps a truncated one and dies on its missing pages, and answers
//! with any symbol of the root's name, of whatever size. So all of that is looked at here, in the file's bytes; and
//! these errors name a remedy, which the loader's do not.

use std::path::Path;

use abi_stable::library::LibHeader;
use torus_abi::root::ROOT_SYMBOL;

use crate::LoadError;

/// ELF machine numbers of the targets Torus runs on, with the names Rust uses for them.
const MACHINES: [(u16, &str); 4] = [(62, "x86_64"), (183, "aarch64"), (243, "riscv64"), (3, "x86")];

/// Checks a plugin file's content; `path` is for the message.
pub(crate) fn check(path: &Path, content: &[u8]) -> Result<(), LoadError> {
    let not = |reason| LoadError::NotALibrary { path: path.to_owned(), reason };
    if content.get(..4) != Some(b"\x7fELF") {
        return Err(not("it does not start with an ELF header"));
    }
    if content.get(4..6) != Some(&[2, 1]) {
        return Err(not("it is not a 64-bit little-endian ELF file"));
    }
    let elf = Elf(content);
    let (Some(kind), Some(machine)) = (elf.half(16), elf.half(18)) else { return Err(not("its header is cut off")) };
    const SHARED_OBJECT: u16 = 3;
    if kind != SHARED_OBJECT {
        return Err(not("it is an ELF file of another type than a shared object"));
    }
    let found = MACHINES.iter().find(|(number, _)| *number == machine).map(|(_, name)| (*name).to_owned());
    let found = found.unwrap_or_else(|| format!("machine {machine}"));
    if found != std::env::consts::ARCH {
        return Err(LoadError::WrongArchitecture { path: path.to_owned(), found, expected: std::env::consts::ARCH });
    }
    if !elf.is_whole().unwrap_or(false) {
        return Err(LoadError::Truncated { path: path.to_owned() });
    }
    let root = elf.root().ok_or_else(|| LoadError::NoRoot { path: path.to_owned() })?;
    const DATA: u8 = 1;
    if root.kind != DATA || root.bytes < size_of::<LibHeader>() as u64 || !elf.is_loaded(root.address, root.bytes) {
        let message = format!("'{ROOT_SYMBOL}' is no header of {} bytes", size_of::<LibHeader>());
        return Err(LoadError::RootMismatch { path: path.to_owned(), message });
    }
    Ok(())
}

/// The content of a 64-bit little-endian ELF file. Reads answer `None` past its end.
#[derive(Clone, Copy)]
struct Elf<'a>(&'a [u8]);

/// A row of the section or segment table.
#[derive(Clone, Copy)]
struct Row<'a>(Elf<'a>, usize);

/// A defined dynamic symbol.
struct Symbol {
    kind: u8,
    address: u64,
    bytes: u64,
}

impl<'a> Elf<'a> {
    fn array<const N: usize>(self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    fn half(self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn word(self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn long(self, at: usize) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    /// The rows of a table, `None` if it does not lie in the file as a whole. Its place is at `offset` in the header,
    /// the size and number of its rows at `rows`.
    fn table(self, offset: usize, rows: usize) -> Option<impl Iterator<Item = Row<'a>>> {
        let start = usize::try_from(self.long(offset)?).ok()?;
        let (size, count) = (usize::from(self.half(rows)?), usize::from(self.half(rows + 2)?));
        self.0.get(start..start.checked_add(size * count)?)?;
        Some((0..count).map(move |row| Row(self, start + row * size)))
    }

    fn segments(self) -> Option<impl Iterator<Item = Row<'a>>> {
        const LOAD: u32 = 1;
        Some(self.table(32, 54)?.filter(|row| row.word(0) == Some(LOAD)))
    }

    fn sections(self) -> Option<impl Iterator<Item = Row<'a>>> {
        self.table(40, 58)
    }

    /// Whether both tables and all that is mapped lie within the file. The section table stands at its end.
    fn is_whole(self) -> Option<bool> {
        let mut ends = self.sections().and(self.segments())?.map(|row| row.long(8)?.checked_add(row.long(32)?));
        Some(ends.all(|end| end.is_some_and(|end| end <= self.0.len() as u64)))
    }

    /// The plugin root among the dynamic symbols.
    fn root(self) -> Option<Symbol> {
        const DYNAMIC_SYMBOLS: u32 = 11;
        const SYMBOL_BYTES: usize = 24;
        let table = self.sections()?.find(|row| row.word(4) == Some(DYNAMIC_SYMBOLS))?;
        let names = self.sections()?.nth(table.word(40)? as usize)?.content()?;
        let (symbols, _) = table.content()?.as_chunks::<SYMBOL_BYTES>();
        symbols.iter().find_map(|symbol| {
            let symbol = Elf(symbol);
            let name = names.get(symbol.word(0)? as usize..)?;
            let defined = symbol.half(6)? != 0;
            let is_root = name.strip_prefix(ROOT_SYMBOL.as_bytes())?.first() == Some(&0);
            let [info] = symbol.array(4)?;
            (is_root && defined).then_some(Symbol {
                kind: info & 0xf,
                address: symbol.long(8)?,
                bytes: symbol.long(16)?,
            })
        })
    }

    /// Whether these addresses lie in one segment.
    fn is_loaded(self, address: u64, bytes: u64) -> bool {
        let within = |row: Row<'_>| {
            let (start, length) = (row.long(16)?, row.long(40)?);
            Some(address >= start && address.checked_add(bytes)? <= start.checked_add(length)?)
        };
        self.segments().is_some_and(|mut segments| segments.any(|row| within(row) == Some(true)))
    }
}

impl<'a> Row<'a> {
    fn word(self, at: usize) -> Option<u32> {
        self.0.word(self.1.checked_add(at)?)
    }

    fn long(self, at: usize) -> Option<u64> {
        self.0.long(self.1.checked_add(at)?)
    }

    /// What a section holds.
    fn content(self) -> Option<&'a [u8]> {
        let (start, bytes) = (usize::try_from(self.long(24)?).ok()?, usize::try_from(self.long(32)?).ok()?);
        self.0.0.get(start..start.checked_add(bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(content: &[u8]) -> LoadError {
        check(Path::new("plugin.so"), content).unwrap_err()
    }

    /// A header that claims to be a shared object for `machine`, with no sections.
    fn header(kind: u16, machine: u16) -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[16..18].copy_from_slice(&kind.to_le_bytes());
        elf[18..20].copy_from_slice(&machine.to_le_bytes());
        elf
    }

    fn this_machine() -> u16 {
        MACHINES.iter().find(|(_, name)| *name == std::env::consts::ARCH).unwrap().0
    }

    #[test]
    fn files_that_are_no_library_for_this_machine_are_told_apart() {
        let not = |content: &[u8], why: &str| {
            let error = refused(content);
            assert!(matches!(error, LoadError::NotALibrary { reason, .. } if reason.contains(why)), "{error}");
        };
        not(b"# a plugin", "ELF header");
        not(&header(2, this_machine()), "type");
        not(&header(3, this_machine())[..17], "cut off");
        assert!(matches!(refused(&header(3, 22)), LoadError::WrongArchitecture { found, .. } if found == "machine 22"));
        let mut cut = header(3, this_machine());
        cut[40..48].copy_from_slice(&9_000u64.to_le_bytes());
        assert!(matches!(refused(&cut), LoadError::Truncated { .. }));
        assert!(matches!(refused(&header(3, this_machine())), LoadError::NoRoot { .. }));
    }

    /// Any file may be given, so no field may be trusted.
    #[test]
    fn a_file_of_garbage_ends_nothing() {
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let mut library = whole[..whole.len().min(1 << 16)].to_vec();
        library[16..18].copy_from_slice(&3u16.to_le_bytes());
        for at in 16..64 {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut damaged = library.clone();
                damaged[at] = byte;
                assert!(check(Path::new("plugin.so"), &damaged).is_err());
            }
        }
    }
}
