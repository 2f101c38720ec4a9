/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What dist/sockd does before anything else; packaging/build links it into PyInstaller's bootloader.
 *
 * The executable runs twice: first as the boot process, which unpacks Python's library and its companions
 * into a directory and waits, then as its child, which is sockd.  Here the boot process chooses the
 * directory, or says in one line why it cannot; and the child sees to it that it does not outlive the
 * boot process, which is the one that service managers know.  sockd.py, leave_boot_process(), takes the
 * variables away again.
 */

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define MEGABYTE (1024UL * 1024)
#define DIRECTORIES 4

/* Set for the child by the bootloader, and by us. */
static const char UNPACKED_VARIABLE[] = "_PYI_APPLICATION_HOME_DIR";
static const char PARENT_VARIABLE[] = "_SOCKD_BOOT_PID";
static const char CHOSEN_VARIABLE[] = "_SOCKD_TMPDIR"; /* TMPDIR is of our choice, and not the caller's */

/* Return why files cannot be unpacked in a directory and run from there, or NULL; uses `text`. */
static const char *find_fault(const char *directory, char *text, size_t size)
{
    struct statvfs system;

    if (access(directory, W_OK | X_OK) != 0 || statvfs(directory, &system) != 0)
        return "cannot be written";
    if (system.f_flag & ST_NOEXEC)
        return "is mounted noexec";
    unsigned long long free_mb = (unsigned long long)system.f_bavail * system.f_frsize / MEGABYTE;
    if (system.f_blocks != 0 && free_mb < UNPACKED_MB) {
        snprintf(text, size, "has %llu MB free", free_mb);
        return text;
    }
    return NULL;
}

/* Have the bootloader unpack where that works; exit with the reasons where there is no such place. */
static void choose_directory(void)
{
    /* A directory that the caller has named is the only one: it is not for us to know better. */
    const char *named = getenv("TMPDIR");
    const char *directories[DIRECTORIES] = {"/tmp", "/var/tmp", "/run", "/dev/shm"};
    char reasons[1024] = "", text[64];
    size_t count = DIRECTORIES, at = 0;

    unsetenv(CHOSEN_VARIABLE);
    if (named != NULL && named[0] != '\0') {
        directories[0] = named;
        count = 1;
    } else {
        setenv(CHOSEN_VARIABLE, "1", 1);
    }
    for (size_t i = 0; i < count; i++) {
        const char *fault = find_fault(directories[i], text, sizeof text);

        if (fault == NULL) {
            setenv("TMPDIR", directories[i], 1);
            return;
        }
        at += (size_t)snprintf(reasons + at, sizeof reasons - at, "%s%s %s", i ? ", " : "", directories[i], fault);
        if (at >= sizeof reasons)
            break;
    }
    fprintf(stderr,
            "sockd: error: cannot unpack: %s.  Set TMPDIR to a directory with %d MB free where programs may run\n",
            reasons, UNPACKED_MB);
    _exit(1);
}

/* End with the boot process, however that ends: killed, it cannot pass anything on. */
static void follow_parent(void)
{
    const char *parent = getenv(PARENT_VARIABLE);

    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (parent != NULL && atol(parent) != (long)getppid())
        _exit(1);
}

/* The bootloader's function that removes the directory in the end; linked with --wrap to come here first. */
__attribute__((weak)) int __real_pyi_recursive_rmdir(const char *directory);
int __wrap_pyi_recursive_rmdir(const char *directory);

int __wrap_pyi_recursive_rmdir(const char *directory)
{
    /* sockd has removed it when it began to serve: no reason for a warning. */
    return access(directory, F_OK) == 0 ? __real_pyi_recursive_rmdir(directory) : 0;
}

__attribute__((constructor)) static void boot(void)
{
    char number[32];

    if (getenv(UNPACKED_VARIABLE) != NULL) {
        follow_parent();
        return;
    }
    choose_directory();
    snprintf(number, sizeof number, "%ld", (long)getpid());
    setenv(PARENT_VARIABLE, number, 1);
}
