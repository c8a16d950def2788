//! Who CMD runs as: under sudo the user who called it, unless `--user` says otherwise.
use anyhow::{Context, Result, bail};
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use std::ffi::{CString, OsStr, OsString};
use std::fmt;

/// The variables that sudo adds, which would tell CMD that it runs as root's.
pub(crate) const SUDO_VARIABLES: [&str; 4] = ["SUDO_UID", "SUDO_GID", "SUDO_USER", "SUDO_COMMAND"];

/// Everything that makes a process a user's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub uid: Uid,
    /// The primary group.
    pub gid: Gid,
    /// All groups, as initgroups(3) sets them.
    pub groups: Vec<Gid>,
    /// Its entry in the user database, where it has one.
    account: Option<Account>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Account {
    name: String,
    home: OsString,
    shell: OsString,
}

impl Identity {
    /// Chooses the user for CMD; `None` for the user that runs `fault`.
    ///
    /// `user` is the argument of `--user`: `NAME`, `UID`, each with `:GROUP` or `:GID`.
    /// `variable` looks up an environment variable (sudo's `SUDO_UID` and `SUDO_GID`).
    ///
    /// # Errors
    /// An unknown name, a malformed number, or another user asked for without being root.
    pub fn choose(
        user: Option<&str>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Option<Self>> {
        let is_root = Uid::effective().is_root();
        if let Some(user) = user {
            let identity = Self::parse(user)?;
            if !is_root && (identity.uid, identity.gid) != (Uid::effective(), Gid::effective()) {
                bail!("--user {user}: only root can run the command as another user");
            }
            return Ok(is_root.then_some(identity));
        }
        let Some(uid) = variable("SUDO_UID").filter(|_| is_root) else {
            return Ok(None);
        };
        let uid = Uid::from_raw(number(&uid).context("SUDO_UID: unset it, or give --user")?);
        if uid.is_root() {
            return Ok(None);
        }
        let account = account_of(uid)?;
        let gid = match (variable("SUDO_GID"), &account) {
            (Some(gid), _) => {
                Gid::from_raw(number(&gid).context("SUDO_GID: unset it, or give --user")?)
            }
            (None, Some(account)) => account.gid,
            (None, None) => bail!("SUDO_UID is {uid}, which has no group: give --user UID:GID"),
        };
        Self::new(uid, gid, account).map(Some)
    }

    fn parse(text: &str) -> Result<Self> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        // As chown(1): a name wins over a number.
        let account = known(User::from_name(user)).context("can't read the user database")?;
        let (uid, account) = if let Some(account) = account {
            (account.uid, Some(account))
        } else {
            let uid = number(OsStr::new(user)).ok().with_context(|| {
                format!("--user {text}: there is no user `{user}` (getent passwd lists them)")
            })?;
            let uid = Uid::from_raw(uid);
            let account = account_of(uid)?;
            (uid, account)
        };
        let gid = match (group, &account) {
            (Some(group), _) => match known(Group::from_name(group))
                .context("can't read the groups")?
            {
                Some(group) => group.gid,
                None => number(OsStr::new(group))
                    .map(Gid::from_raw)
                    .ok()
                    .with_context(|| {
                        format!(
                            "--user {text}: there is no group `{group}` (getent group lists them)"
                        )
                    })?,
            },
            (None, Some(account)) => account.gid,
            (None, None) => bail!("--user {text}: user {uid} has no group here: give {uid}:GID"),
        };
        Self::new(uid, gid, account)
    }

    fn new(uid: Uid, gid: Gid, account: Option<User>) -> Result<Self> {
        let groups = match &account {
            Some(account) => {
                let name = CString::new(account.name.as_str())
                    .context("the user name contains a NUL byte")?;
                getgrouplist(&name, gid)
                    .with_context(|| format!("can't list the groups of {}", account.name))?
            }
            None => vec![gid],
        };
        Ok(Self {
            uid,
            gid,
            groups,
            account: account.map(|account| Account {
                name: account.name,
                home: account.dir.into_os_string(),
                shell: account.shell.into_os_string(),
            }),
        })
    }

    /// The environment variables that a log-in as this user would set.
    pub(crate) fn variables(&self) -> Vec<(&'static str, OsString)> {
        match &self.account {
            Some(account) => vec![
                ("HOME", account.home.clone()),
                ("SHELL", account.shell.clone()),
                ("USER", OsString::from(&account.name)),
                ("LOGNAME", OsString::from(&account.name)),
            ],
            // As login(1) does for whom it has no entry.
            None => vec![
                ("HOME", OsString::from("/")),
                ("SHELL", OsString::from("/bin/sh")),
                ("USER", OsString::from(self.uid.to_string())),
                ("LOGNAME", OsString::from(self.uid.to_string())),
            ],
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.account {
            Some(account) => f.write_str(&account.name),
            None => write!(f, "{}:{}", self.uid, self.gid),
        }
    }
}

fn account_of(uid: Uid) -> Result<Option<User>> {
    known(User::from_uid(uid)).context("can't read the user database")
}

/// Where there is no database at all, as in an image of one program, nobody has an entry.
fn known<T>(found: nix::Result<Option<T>>) -> nix::Result<Option<T>> {
    match found {
        Err(nix::errno::Errno::ENOENT) => Ok(None),
        other => other,
    }
}

/// A user or group number. The largest one means "don't change" to the kernel.
fn number(text: &OsStr) -> Result<u32> {
    text.to_str()
        .and_then(|text| text.parse().ok())
        .filter(|number| *number != u32::MAX)
        .with_context(|| format!("`{}` is not a user or group number", text.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str) -> Option<OsString> {
        None
    }

    fn sudo(uid: &str, gid: &str) -> impl Fn(&str) -> Option<OsString> {
        move |name| match name {
            "SUDO_UID" => Some(uid.into()),
            "SUDO_GID" => Some(gid.into()),
            _ => None,
        }
    }

    fn is_root() -> bool {
        let is_root = Uid::effective().is_root();
        if !is_root {
            eprintln!("skipped: needs root");
        }
        is_root
    }

    #[test]
    fn without_sudo_and_user_nothing_changes() {
        assert_eq!(Identity::choose(None, none).unwrap(), None);
    }

    #[test]
    fn root_calling_sudo_stays_root() {
        assert_eq!(Identity::choose(None, sudo("0", "0")).unwrap(), None);
    }

    #[test]
    fn sudo_restores_the_caller_with_or_without_an_account() {
        if !is_root() {
            return;
        }
        let nobody = User::from_name("nobody")
            .unwrap()
            .expect("every system has it");
        let gid = nobody.gid.to_string();
        let found = Identity::choose(None, sudo(&nobody.uid.to_string(), &gid))
            .unwrap()
            .unwrap();
        assert_eq!((found.uid, found.gid), (nobody.uid, nobody.gid));
        assert!(found.groups.contains(&nobody.gid));
        assert!(found.variables().contains(&("USER", "nobody".into())));
        let unknown = Identity::choose(None, sudo("54321", "54322"))
            .unwrap()
            .unwrap();
        assert_eq!(unknown.groups, [Gid::from_raw(54322)]);
        assert_eq!(unknown.to_string(), "54321:54322");
        assert!(unknown.variables().contains(&("HOME", "/".into())));
    }

    #[test]
    fn malformed_sudo_variables_are_errors_not_root() {
        if !is_root() {
            return;
        }
        for (uid, gid) in [
            ("", "1"),
            ("x", "1"),
            ("-1", "1"),
            ("4294967295", "1"),
            ("7", "y"),
        ] {
            assert!(
                Identity::choose(None, sudo(uid, gid)).is_err(),
                "{uid} {gid}"
            );
        }
    }

    #[test]
    fn user_argument_takes_names_and_numbers() {
        if !is_root() {
            return;
        }
        let choose = |text: &str| Identity::choose(Some(text), sudo("1", "1"));
        let nobody = choose("nobody").unwrap().unwrap();
        assert_eq!(nobody.to_string(), "nobody");
        assert_eq!(choose(&nobody.uid.to_string()).unwrap().unwrap(), nobody);
        assert_eq!(
            choose("54321:54322").unwrap().unwrap().gid,
            Gid::from_raw(54322)
        );
        assert_eq!(
            choose("nobody:root").unwrap().unwrap().gid,
            Gid::from_raw(0)
        );
        assert!(choose("root").unwrap().unwrap().uid.is_root());
        let error = choose("no-such-user").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("there is no user `no-such-user`"),
            "{error}"
        );
        assert!(
            choose("54321")
                .unwrap_err()
                .to_string()
                .contains("give 54321:GID")
        );
        assert!(choose("nobody:no-such-group").is_err());
    }
}
