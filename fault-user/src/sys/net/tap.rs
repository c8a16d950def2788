//! Tap devices: that of the delay line, and that below the divider.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context as _, Error, Result};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// What the kernel puts in front of each frame: `struct virtio_net_hdr`, which describes checksums and segmentation
/// that are still to be done.
pub const HEADER_BYTES: usize = 10;
/// Where the tag is that the programs put in front of the frame's type.
pub const TAG_AT: usize = HEADER_BYTES + 14;
/// Bytes of that tag.
pub const TAG_BYTES: usize = 4;
/// The largest frame, its header included: a super-packet of 64 KiB, rounded up.
pub const FRAME_MAX: usize = HEADER_BYTES + (64 << 10) + 64;
/// Frames that wait in the kernel for this process to read them.
const QUEUE_FRAMES: i32 = 20_000;
/// Bytes of the largest packet that a tap takes.
const MTU_BYTES: i32 = 65_521;

/// Offloads that the tap takes over: checksums, segmentation of TCP over both versions of IP, with ECN.
const OFFLOADS: libc::c_uint = 0x01 | 0x02 | 0x04 | 0x08;
/// Segmentation of UDP over both versions of IP (Linux 6.2).
const OFFLOADS_UDP: libc::c_uint = 0x20 | 0x40;

/// A tap device, which the kernel removes when this is dropped or the process ends.
pub struct Tap {
    file: File,
    name: String,
    index: u32,
}

impl Tap {
    /// Whether a tap device can be created, according to the device file.
    #[must_use]
    pub fn is_possible() -> bool {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        // Containers may have another file in its place, which supports no requests.
        options.open("/dev/net/tun").is_ok_and(|file| {
            let mut features: libc::c_uint = 0;
            // SAFETY: TUNGETFEATURES writes one number.
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETFEATURES, &raw mut features) == 0 }
        })
    }

    /// Creates a tap device in the calling thread's network namespace, and sets it up. `purpose` is what needs it.
    ///
    /// # Errors
    /// No `/dev/net/tun`, or no rights to make a device.
    pub fn create(name: &str, purpose: &str) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .with_context(|| {
                format!(
                    "{purpose} needs a tap device, but /dev/net/tun can't be opened (in a container: --device \
                     /dev/net/tun)"
                )
            })?;
        let mut request = request(name);
        request.ifr_ifru.ifru_flags =
            i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
        // SAFETY: the requests take what they are given, all of it alive.
        unsafe {
            Errno::result(libc::ioctl(
                file.as_raw_fd(),
                libc::TUNSETIFF,
                &raw mut request,
            ))
            .map_err(|error| not_made(error, purpose))?;
            let all = libc::c_ulong::from(OFFLOADS | OFFLOADS_UDP);
            if libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, all) != 0 {
                let older = libc::c_ulong::from(OFFLOADS);
                Errno::result(libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, older))
                    .context("the tap device does not support offloads")?;
            }
        }
        be_quiet(name);
        switch_on(name).with_context(|| format!("setting {name} up"))?;
        let index = nix::net::if_::if_nametoindex(name)?;
        Ok(Self {
            file,
            name: name.to_owned(),
            index,
        })
    }

    /// The device's index.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads one frame; `None` if none is waiting.
    ///
    /// # Errors
    /// The device was removed.
    pub fn read(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match (&self.file).read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).context("reading from the tap device"),
        }
    }

    /// Writes one frame given in parts.
    ///
    /// # Errors
    /// The kernel refuses the frame.
    pub fn write_parts(&self, parts: &[IoSlice<'_>]) -> std::io::Result<()> {
        // A device takes a frame as a whole or not at all.
        (&self.file).write_vectored(parts).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether a frame, with what the kernel puts in front of it, stands for several wire packets.
#[must_use]
pub fn is_super_packet(frame: &[u8]) -> bool {
    /// Offset of the type of segmentation in `struct virtio_net_hdr`; 0 is none.
    const SEGMENTATION_AT: usize = 1;
    frame.get(SEGMENTATION_AT).is_some_and(|kind| *kind != 0)
}

/// Why there is no device, and what to do.
fn not_made(error: Errno, purpose: &str) -> Error {
    let why = match error {
        Errno::EPERM => ", which needs CAP_NET_ADMIN",
        // Containers may have another file in its place.
        Errno::ENOTTY => {
            ", but /dev/net/tun is not a tap device (in a container: --device /dev/net/tun)"
        }
        _ => ", but the kernel can't create one",
    };
    Error::new(error).context(format!("{purpose} needs a tap device{why}"))
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

/// Keeps the network stack from sending router solicitations and the like through the device. If the setting can't be
/// written, as in many containers, the reader discards them.
pub fn be_quiet(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    drop(std::fs::write(path, "1"));
}

fn switch_on(name: &str) -> Result<()> {
    let control = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut request = request(name);
    // SAFETY: as above.
    unsafe {
        request.ifr_ifru.ifru_mtu = QUEUE_FRAMES;
        Errno::result(libc::ioctl(
            control.as_raw_fd(),
            libc::SIOCSIFTXQLEN,
            &raw mut request,
        ))?;
        request.ifr_ifru.ifru_mtu = MTU_BYTES;
        Errno::result(libc::ioctl(
            control.as_raw_fd(),
            libc::SIOCSIFMTU,
            &raw mut request,
        ))?;
        request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP)?;
        Errno::result(libc::ioctl(
            control.as_raw_fd(),
            libc::SIOCSIFFLAGS,
            &raw mut request,
        ))?;
    }
    Ok(())
}
