/* A device on the host: a key-value store in memory and a console, for app_entry.c and hal_template.c.
 *
 *     device WORD... [/ WORD...]...      type these command lines at its console, one after the other
 *
 * KV_FAILS=KEY: writing that key fails. KV_FORGETS=KEY: writing it seems to work. KV_DIES=KEY: the
 * power fails just then. NO_IP=1: there is no network. */
#define _POSIX_C_SOURCE 200809L

#include <aos/cli.h>
#include <aos/kernel.h>
#include <aos/kv.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define KEYS 8

uint32_t HAL_Wifi_Get_IP(char *ip_str, const char *ifname);
void linkkey_register(void);

static struct {
    char key[32];
    char value[512];
    int length;
} kv[KEYS];

static const struct cli_command *registered;

static int is_set_to(const char *variable, const char *value)
{
    const char *setting = getenv(variable);

    return setting != NULL && strcmp(setting, value) == 0;
}

int aos_kv_set(const char *key, const void *value, int length, int sync)
{
    int i = 0;

    (void)sync;
    if (length > (int)sizeof kv[0].value || is_set_to("KV_FAILS", key))
        return -1;
    if (is_set_to("KV_FORGETS", key))
        return 0;
    if (is_set_to("KV_DIES", key))
        exit(0);
    while (kv[i].key[0] != '\0' && strcmp(kv[i].key, key) != 0)
        i++;
    snprintf(kv[i].key, sizeof kv[i].key, "%s", key);
    memcpy(kv[i].value, value, (size_t)length);
    kv[i].length = length;
    return 0;
}

int aos_kv_get(const char *key, void *buffer, int *length)
{
    int i;

    for (i = 0; i < KEYS; i++)
        if (strcmp(kv[i].key, key) == 0) {
            if (kv[i].length > *length)
                return -1;
            memcpy(buffer, kv[i].value, (size_t)kv[i].length);
            *length = kv[i].length;
            return 0;
        }
    return -1;
}

int aos_cli_printf(const char *format, ...)
{
    va_list arguments;
    int count;

    va_start(arguments, format);
    count = vprintf(format, arguments);
    va_end(arguments);
    return count;
}

int aos_cli_register_command(const struct cli_command *command)
{
    registered = command;
    return 0;
}

uint32_t HAL_Wifi_Get_IP(char *ip_str, const char *ifname)
{
    (void)ifname;
    strcpy(ip_str, getenv("NO_IP") != NULL ? "" : "192.168.1.2");
    return 0;
}

void *aos_malloc(unsigned int size)
{
    return malloc(size);
}

void aos_free(void *memory)
{
    free(memory);
}

void aos_msleep(int ms)
{
    struct timespec rest = {ms / 1000, (long)(ms % 1000) * 1000000L};

    nanosleep(&rest, NULL);
}

long long aos_now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int main(int argc, char **argv)
{
    int first = 1, i;

    linkkey_register();
    for (i = 1; i <= argc; i++)
        if (i == argc || strcmp(argv[i], "/") == 0) {
            if (strcmp(argv[first], registered->name) == 0)
                registered->function(NULL, 0, i - first, argv + first);
            first = i + 1;
        }
    return 0;
}
