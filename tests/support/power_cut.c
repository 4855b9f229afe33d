/* What a disk would still hold after a power cut, seen from below Python and SQLite.
 *
 * Preloaded into a process. Whenever it syncs something below $DISK_ROOT, what is now certain to
 * stay is kept in $DISK_KEPT, by inode: a file's bytes in "file-INODE", a folder's entries in
 * "folder-INODE", one "INODE NAME" a line. Nothing else outlives power_cut.py's cut().
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void keep_file(int from, const char *link, FILE *to) {
    char block[1 << 16];
    ssize_t got = pread(from, block, sizeof block, 0);
    if (got < 0 && errno == EBADF) { /* open for writing only */
        from = open(link, O_RDONLY | O_CLOEXEC);
        got = pread(from, block, sizeof block, 0);
    }
    for (off_t place = 0; got > 0; got = pread(from, block, sizeof block, place)) {
        fwrite(block, 1, got, to);
        place += got;
    }
}

static void keep_folder(const char *link, FILE *to) {
    DIR *folder = opendir(link);
    struct dirent *entry;
    struct stat found;
    while (folder && (entry = readdir(folder)))
        if (entry->d_name[0] != '.' || (entry->d_name[1] && strcmp(entry->d_name, "..")))
            if (!fstatat(dirfd(folder), entry->d_name, &found, AT_SYMLINK_NOFOLLOW))
                fprintf(to, "%lu %s\n", (unsigned long)found.st_ino, entry->d_name);
    if (folder)
        closedir(folder);
}

static int kept(int synced, int file) {
    const char *root = getenv("DISK_ROOT"), *folder = getenv("DISK_KEPT");
    char link[64], path[PATH_MAX] = "", name[PATH_MAX], unfinished[PATH_MAX + 8];
    struct stat found;
    if (synced || !root || !folder)
        return synced;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) < 0 || strncmp(path, root, strlen(root)))
        return synced;
    if (fstat(file, &found))
        abort();
    int is_folder = S_ISDIR(found.st_mode);
    snprintf(name, sizeof name, "%s/%s-%lu", folder, is_folder ? "folder" : "file",
             (unsigned long)found.st_ino);
    snprintf(unfinished, sizeof unfinished, "%s.tmp", name);
    FILE *to = fopen(unfinished, "wb");
    if (!to)
        abort();
    if (is_folder)
        keep_folder(link, to);
    else
        keep_file(file, link, to);
    fclose(to);
    rename(unfinished, name);
    dup(file); /* never closed: as long as this process lives, nobody else gets the inode */
    return synced;
}

int fsync(int file) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return kept(real(file), file);
}

int fdatasync(int file) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return kept(real(file), file);
}
